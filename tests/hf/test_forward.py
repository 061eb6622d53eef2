"""Logits and loss beside the model's own."""

import pytest
import torch

from pal.data.prompts import encode, user_turn
from pal.errors import PalError, PromptError
from pal.hf import PalForConditionalGeneration, PalProcessor
from pal.types import AUDIO, IGNORE, Batch, Tokens
from tests.hf.chats import KINDS, QUESTION, chat, heard, model_of, one_kind, say, tensors, turns
from tests.models import WORDS, noise, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_models_own(kind):
    model = model_of(kind)
    processor = PalProcessor.of(model)
    chats = [turns(0.5, 0, "yes"), turns(0.9, 1, "a loud siren", say("yes"), say("no", role="assistant"))]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, IGNORE)
    loss = PalForConditionalGeneration.wrap(model)(**inputs, labels=labels).loss
    as_turns = [
        [user_turn(QUESTION, 1), {"role": "assistant", "content": "yes"}],
        [
            {"role": "user", "content": "yes"},
            {"role": "assistant", "content": "no"},
            user_turn(QUESTION, 1),
            {"role": "assistant", "content": "a loud siren"},
        ],
    ]
    rows = [encode(model.tokenizer, talk, [i], train=True) for i, talk in enumerate(as_turns)]
    assert [int(n) for n in (labels != IGNORE).sum(1)] == [sum(x != IGNORE for x in row.labels) for row in rows]
    total, tokens = model.loss(Batch([noise(0.5), noise(0.9, 1)], rows))
    torch.testing.assert_close(loss, total / tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stand_in_the_columns_of_the_ids(kind):
    """Each column predicts the next id, whatever rows a clip has: the same as asking for that id's likelihood."""
    model = model_of(kind)
    processor = PalProcessor.of(model)
    wrapped = PalForConditionalGeneration.wrap(model)
    talk = [say("yes", heard(noise(0.4).numpy()), "no", heard(noise(0.6, 1).numpy()), QUESTION)]
    inputs = tensors(processor, talk, chat(0.3))
    logits = wrapped(**inputs).logits
    ids = inputs["input_ids"]
    assert logits.shape == (*ids.shape, model.llm.vocab)
    log_p = logits.log_softmax(-1)
    clips = [noise(0.4), noise(0.6, 1)]
    found = ids[0][inputs["attention_mask"][0] != 0].tolist()
    for at in range(1, len(found)):
        if found[at] == AUDIO:
            continue
        labels = [found[at] if i == at else IGNORE for i in range(len(found))]
        expected = model.answer_scores(clips, [Tokens(found, [0, 1], labels)])[0]
        torch.testing.assert_close(log_p[0, at - 1, found[at]], expected, atol=1e-4, rtol=0)
    # padding has none, and a batch equals its rows alone
    assert not logits[1][inputs["attention_mask"][1] == 0].any()
    alone = tensors(processor, chat(0.3))
    torch.testing.assert_close(
        logits[1][inputs["attention_mask"][1] != 0], wrapped(**alone).logits[0], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(wrapped(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    assert wrapped(**inputs, return_dict=False)[0].equal(logits)


@pytest.mark.parametrize("pair", ["plits", "lal", "flamingo"], indirect=True)
def test_a_clip_before_everything(pair):
    """Nothing stands before it, so LAL has no row that predicts what follows."""
    model, auto, processor = pair
    inputs = processor(text="<audio>a loud siren", audio=noise(0.4))
    assert torch.isfinite(auto(**inputs).logits).all()
    ids = inputs["input_ids"][0].tolist()
    total, tokens = model.loss(Batch([noise(0.4)], [Tokens(ids, [0], [IGNORE, *ids[1:]])]))
    assert tokens > 1
    torch.testing.assert_close(auto(**inputs, labels=inputs["input_ids"]).loss, total / tokens)


@one_kind
def test_tensors_that_do_not_fit(pair):
    _, auto, processor = pair
    inputs = dict(tensors(processor, chat(0.3), chat(0.5, question=" ".join(WORDS))))
    for changed, says in (
        ({"input_values": inputs["input_values"][:1], "audio_lengths": inputs["audio_lengths"][:1]}, "1 clips but 2"),
        ({"input_values": None, "audio_lengths": None}, "0 clips but 2"),
        ({"attention_mask": None}, "no attention_mask"),
        ({"attention_mask": inputs["attention_mask"][:, 1:]}, "attention_mask has shape"),
        ({"audio_lengths": inputs["audio_lengths"] + 9000}, "do not fit"),
        ({"input_values": inputs["input_values"][0]}, "have shape"),
        ({"input_ids": inputs["input_ids"][0]}, "have shape"),
    ):
        for run in (auto, auto.generate):
            with pytest.raises(PromptError, match=says) as caught:
                run(**inputs | changed)
            assert "\n" not in str(caught.value)
    with pytest.raises(PalError, match="input_ids"):
        auto()
    with pytest.raises(PalError, match="past_key_values"):
        auto(**inputs, past_key_values=object())


def test_another_attention_is_refused():
    """Trap: it would be deaf."""
    wrapped = PalForConditionalGeneration.wrap(tiny_model("lal"))
    wrapped.pal.llm.lm.set_attn_implementation("eager")
    inputs = tensors(PalProcessor.of(wrapped.pal), chat(0.3))
    with pytest.raises(PalError, match="ignores audio"):
        wrapped(**inputs)
    with pytest.raises(PalError, match="ignores audio"):
        wrapped.generate(**inputs)


def test_gradient_checkpointing_changes_no_gradient():
    wrapped = PalForConditionalGeneration.wrap(tiny_model()).train()
    inputs = PalProcessor.of(wrapped.pal).apply_chat_template(
        turns(0.4, 0, "yes"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    grads = []
    for on in (False, True):
        wrapped.zero_grad()
        torch.manual_seed(0)
        (wrapped.gradient_checkpointing_enable if on else wrapped.gradient_checkpointing_disable)()
        wrapped.pal.ears.encoders.eval()
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None})
    assert any("integration" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    with pytest.raises(PalError, match="use_reentrant"):
        wrapped.gradient_checkpointing_enable({"use_reentrant": True})
