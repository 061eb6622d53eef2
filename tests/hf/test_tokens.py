"""Tokens that an LLM has no embedding for: its tokenizer's own, and those that are added."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from pal.backbone.llm import Backbone
from pal.data.prompts import encode, user_turn
from pal.errors import PromptError
from pal.hf import PalForConditionalGeneration, PalProcessor
from pal.types import AUDIO, Batch, Tokens
from tests.hf.chats import QUESTION, chat, tensors
from tests.models import ENCODER, LLM, noise, pal, tiny_model

EXTRA = "<image_soft_token>"
FAMILIES = {"gemma3_text": {"model_type": "gemma3_text", "head_dim": 8}, "llama": {"model_type": "llama"}}
CLIP = (noise(0.3).numpy(), 16_000)


def llm_folder(folder, family="llama", pad=False):
    """An LLM whose tokenizer has one entry more than its embeddings have rows."""
    donor = tiny_model()
    rows = len(donor.tokenizer)
    llm = Backbone.load({**LLM, **FAMILIES[family], "vocab_size": rows})
    llm.save(folder)
    donor.tokenizer.add_special_tokens({"pad_token": EXTRA} if pad else {"additional_special_tokens": [EXTRA]})
    assert len(donor.tokenizer) == rows + 1
    donor.tokenizer.save_pretrained(folder)
    return str(folder), rows


def attached(path):
    """The LLM and its own tokenizer, with ears."""
    torch.manual_seed(0)
    return pal.attach(llm=path, encoders=[ENCODER], integration="lal")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_that_nobody_uses_does_no_harm(family, tmp_path):
    path, rows = llm_folder(tmp_path / "llm", family)
    model = attached(path)
    assert len(model.tokenizer) == rows + 1 == model.llm.vocab + 1
    said = model.ask(CLIP, QUESTION, max_new_tokens=4)
    model.save_pretrained(tmp_path / "m")
    again = pal.load(tmp_path / "m")
    assert again.digest == model.digest
    assert again.ask(CLIP, QUESTION, max_new_tokens=4) == said
    # typed into a question it stays text, as all marks do
    assert isinstance(model.ask(CLIP, f"What is {EXTRA}?", max_new_tokens=2), str)


def test_its_use_is_one_clear_error(tmp_path):
    path, rows = llm_folder(tmp_path / "llm")
    model = attached(path)
    model.save_pretrained(tmp_path / "m")
    auto = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    inputs = AutoProcessor.from_pretrained(tmp_path / "m")(text=f"<audio>{EXTRA} yes", audio=noise(0.3))
    plain = dict(tensors(PalProcessor.of(model), chat(0.3)))
    row = encode(model.tokenizer, [user_turn(QUESTION, 1)], [0])
    wrong = Tokens([*row.ids, rows], row.clips, [*row.ids, rows])
    clips = [noise(0.3)]
    for use in (
        lambda: auto(**inputs),
        lambda: auto.generate(**inputs),
        lambda: auto(**inputs, labels=inputs["input_ids"]),
        lambda: model.loss(Batch(clips, [wrong])),
        lambda: model.answer_scores(clips, [wrong]),
        lambda: model.generate(clips, [wrong]),
        lambda: list(model.stream(clips, wrong)),
    ):
        with pytest.raises(
            PromptError, match=rf"'{EXTRA}' \(id {rows}\) is outside .* vocabulary of {rows}; "
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match=f"label {rows} is outside"):
        auto(**plain, labels=torch.full_like(plain["input_ids"], rows))
    with pytest.raises(PromptError, match=r"id -7 is outside"):
        auto(**{**plain, "input_ids": plain["input_ids"].masked_fill(plain["input_ids"] != AUDIO, -7)})


def test_padding_without_a_row(tmp_path):
    """Rows of a batch that have ended go on with padding, which the LLM gets as well."""
    path, rows = llm_folder(tmp_path / "llm", pad=True)
    model = attached(path)
    assert model.tokenizer.pad_token_id == rows
    questions = ["yes", QUESTION, "no"]
    alone = [model.ask(CLIP, question, max_new_tokens=8) for question in questions]
    assert model.ask(CLIP, questions, max_new_tokens=8) == alone
    wrapped = PalForConditionalGeneration.wrap(model)
    inputs = tensors(PalProcessor.of(model), chat(0.3), chat(0.3, question="yes"))
    width = inputs["input_ids"].shape[1]
    first = wrapped.generate(**inputs, max_new_tokens=1)[:, width].tolist()
    assert first[0] != first[1]
    made = wrapped.generate(**inputs, max_new_tokens=4, min_new_tokens=0, eos_token_id=first[1])
    assert made.shape[1] > width + 1, "one row has ended, the other goes on"
    assert torch.isfinite(wrapped(**inputs).logits).all()


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_are_added(tied, tmp_path):
    model = tiny_model(llm={"fresh": {**LLM, "tie_word_embeddings": tied}})
    wrapped = PalForConditionalGeneration.wrap(model)
    usual = tensors(PalProcessor.of(model), chat(0.3))
    before = wrapped(**usual).logits
    model.tokenizer.add_tokens(["<siren>"])
    id_ = model.tokenizer.convert_tokens_to_ids("<siren>")
    assert id_ < 320, "the embeddings have rows to spare"
    torch.manual_seed(0)
    table = wrapped.resize_token_embeddings(330)
    assert table is wrapped.get_input_embeddings()
    assert table.weight.shape[0] == wrapped.get_output_embeddings().weight.shape[0] == 330 == model.llm.vocab
    assert (wrapped.get_output_embeddings().weight is table.weight) == tied
    torch.testing.assert_close(wrapped(**usual).logits[..., :320], before)
    assert wrapped.config.get_text_config().vocab_size == 330
    inputs = PalProcessor.of(model)(text="<user><audio>\n<siren><assistant>", audio=noise(0.3))
    assert id_ in inputs["input_ids"]
    far = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == id_, 329)}
    assert wrapped(**far).logits.shape[-1] == 330
    wrapped.save_pretrained(tmp_path / "m")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert again.pal.digest == model.digest
    assert AutoProcessor.from_pretrained(tmp_path / "m")(text="<siren>")["input_ids"].tolist() == [[id_]]
    torch.testing.assert_close(again(**far).logits, wrapped(**far).logits)


def test_resizing_does_not_tie_a_head_again():
    model = tiny_model(llm={"fresh": {**LLM, "tie_word_embeddings": True}})
    head = model.llm.lm.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    expected = head.weight.clone()
    model.llm.resize_vocab(328)
    assert model.llm.lm.lm_head.weight[:320].equal(expected)
    assert not model.llm.lm.model.embed_tokens.weight[:320].equal(expected)
