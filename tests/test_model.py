"""The whole model: what `ask` takes and gives, padding, sharing, and that it hears."""

import inspect

import numpy as np
import pytest
import soundfile
import torch

from pal.backbone.audio_kv import AudioKV
from pal.backbone.packed import PackedContext
from pal.config import parse
from pal.data.prompts import encode, user_turn
from pal.errors import AudioError, BundleError, ConfigError, PalError, PromptError
from pal.model_config import ModelConfig
from pal.probe.when import most_attended
from pal.types import AUDIO, IGNORE, Batch, Tokens
from tests.models import INTEGRATIONS, LLM, noise, pal, tiny_model, tone

QUESTION = "What sound is this?"


@pytest.fixture(scope="module", params=INTEGRATIONS)
def model(request):
    return tiny_model(request.param)


def clip(seconds, seed=0):
    return (noise(seconds, seed).numpy(), 16_000)


def test_sixteen_clips_in_one_batch_give_the_single_answers(model):
    clips = [clip(0.2 + 0.17 * i, seed=i) for i in range(16)]
    together = model.ask(clips, QUESTION, max_new_tokens=8)
    assert together == [model.ask(one, QUESTION, max_new_tokens=8) for one in clips]
    assert len(set(together)) > 4, "the answers do not depend on the clips, so this shows nothing"


def test_batched_logits_equal_single_ones(model):
    clips = [noise(0.2 + 0.3 * i, seed=i) for i in range(5)]
    rows = [encode(model.tokenizer, [user_turn(QUESTION, 1)], [i]) for i in range(5)]
    together = model.llm(model.inputs(clips, rows, "left")).logits
    for i, samples in enumerate(clips):
        alone = model.llm(model.inputs([samples], [rows[0]], "left")).logits
        torch.testing.assert_close(together[i, -1], alone[0, -1], atol=1e-4, rtol=0)


def test_questions_share_a_clip(model):
    questions = [QUESTION, "Is there a dog?", "How many sounds are there?"]
    assert model.ask(clip(1.0), questions) == [model.ask(clip(1.0), question) for question in questions]


@pytest.mark.parametrize("integration", ["plits", "lal", "pal", {"name": "flamingo", "every": 2}], ids=str)
def test_sixteen_questions_on_one_copy_of_a_clip_get_the_single_answers(integration, monkeypatch):
    model = tiny_model(integration)
    read = []
    ours = model.llm.read_prefixes

    def watched(prefixes, rows):
        read.append(prefixes.inputs_embeds_BTD.shape[0])
        return ours(prefixes, rows)

    monkeypatch.setattr(model.llm, "read_prefixes", watched)
    questions = [f"{'Please say: ' * (i % 3)}What is sound {i}?" for i in range(16)]
    heard = clip(1.3)
    alone = [model.ask(heard, question, max_new_tokens=6) for question in questions]
    assert len(set(alone)) > 3 and not read
    assert model.ask(heard, questions, max_new_tokens=6) == alone and read == [1]
    assert model.ask(model.index(heard), questions, max_new_tokens=6) == alone and read == [1, 1]
    two = model.ask(heard, questions[:2], max_new_tokens=6, num_beams=2)  # as transformers' loop does it
    assert two == [model.ask(heard, one, max_new_tokens=6, num_beams=2) for one in questions[:2]] and read == [1, 1]
    model.llm.shares_prefixes = False
    assert model.ask(heard, questions, max_new_tokens=6) == alone and read == [1, 1]


def test_a_question_outside_of_the_vocabulary_is_one_line(model):
    rows = [Tokens([5, AUDIO, 6], [0]), Tokens([5, AUDIO, 10_000], [0])]
    with pytest.raises(PromptError, match=r"10000.*outside of the LLM's vocabulary"):
        model.generate([noise(0.3)], rows)


def test_an_indexed_clip_answers_alike(model, tmp_path):
    indexed = model.index(clip(1.3))
    assert model.ask(indexed, QUESTION) == model.ask(clip(1.3), QUESTION)
    indexed.save(tmp_path / "clip.safetensors")
    assert model.ask(AudioKV.load(tmp_path / "clip.safetensors"), [QUESTION]) == [model.ask(clip(1.3), QUESTION)]


def test_keys_of_several_clips_are_several_clips(model):
    both = AudioKV.concat([model.index(clip(1.3)), model.index(clip(0.7, 1))])
    question = f"<audio><audio>{QUESTION}"
    details = [model.ask_detailed(given, question, max_new_tokens=6)[0] for given in (both, [both[0], both[1]])]
    assert details[0].text == details[1].text and details[0].audio_tokens == details[1].audio_tokens
    assert model.ask(both, [QUESTION, QUESTION], max_new_tokens=6) == [
        model.ask(both[i], QUESTION, max_new_tokens=6) for i in range(2)
    ]
    with pytest.raises(PromptError):
        model.ask(both, "<audio> alone")
    with pytest.raises(PromptError):
        model.chat().ask(f"<audio>{QUESTION}", both)
    with pytest.raises(AudioError, match="stands for 2 clips, not for one"):
        model.generate([both], [Tokens([5, AUDIO, 6], [0])])
    with pytest.raises(AudioError, match="stands for 2 clips, not for one"):
        most_attended(model, both, QUESTION, "a")


def test_an_indexed_clip_of_another_model_is_refused(model):
    other = tiny_model(model.config.integration, seed=1)
    with pytest.raises(BundleError, match="index"):
        model.ask(other.index(clip(0.5)), QUESTION)


def test_streaming_gives_the_same_text(model):
    assert "".join(model.ask(clip(1.0), QUESTION, stream=True)).strip() == model.ask(clip(1.0), QUESTION)


def test_detailed_answers(model):
    (answer,) = model.ask_detailed(clip(2.01), QUESTION)
    assert answer.text == model.ask(clip(2.01), QUESTION)
    assert answer.audio_seconds == answer.audio_seconds_used == pytest.approx(2.01)
    assert answer.audio_tokens == 51
    assert set(answer.seconds) == {"encode", "prefill", "generate"}
    assert all(seconds >= 0 for seconds in answer.seconds.values())


def test_detailed_answers_of_indexed_clips(model):
    (answer,) = model.ask_detailed(model.index(clip(2.0)), QUESTION)
    assert (answer.text, answer.audio_seconds, answer.audio_tokens) == (model.ask(clip(2.0), QUESTION), 2.0, 50)


def test_seconds_are_right_where_the_connectors_tokens_stand_for_no_time(tmp_path):
    # a Q-Former makes as many tokens of any clip, with a time scale of 0
    heard = tiny_model("pal", connector={"name": "qformer", "queries": 5, "layers": 1})
    (answer,) = heard.ask_detailed(clip(1.3), QUESTION)
    assert answer.audio_seconds == answer.audio_seconds_used == pytest.approx(1.3)
    assert answer.audio_tokens == 5
    heard.index(clip(1.3)).save(tmp_path / "clip.safetensors")
    stored = AudioKV.load(tmp_path / "clip.safetensors")
    (again,) = heard.ask_detailed(stored, QUESTION)
    assert (again.text, again.audio_seconds, again.audio_seconds_used) == (answer.text, 1.3, 1.3)
    with pytest.raises(PalError, match="cannot be cut"):
        stored.slice(0.0, 0.5)


def test_chat_turns_with_several_clips(model):
    turns = [
        {"role": "user", "content": "<audio> What sound is this?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And this one: <audio>"},
    ]
    answer = model.ask([clip(0.5), clip(0.9, seed=1)], turns)
    assert isinstance(answer, str)
    rows = [encode(model.tokenizer, turns, [0, 1])]
    assert model.generate([noise(0.5), noise(0.9, seed=1)], rows) == [answer]


def test_several_clips_in_one_question(model):
    clips = [clip(0.5), clip(0.9, seed=1)]
    question = "<audio> <audio> Which comes first, the dog or the bell?"
    turns = [{"role": "user", "content": question}]
    assert model.ask(clips, question) == model.ask(clips, turns)


def test_text_alone(model):
    assert isinstance(model.ask([], QUESTION), str)


@pytest.mark.parametrize(
    ("clips", "question"),
    [
        ([], "<audio> What is this?"),
        ([clip(0.3)], "<audio> or <audio>?"),
        ([clip(0.3)], [{"role": "user", "content": "What is this?"}]),
        ([clip(0.3), clip(0.3)], [{"role": "user", "content": "<audio> What is this?"}]),
        ([clip(0.3), clip(0.3)], ["a", "b", "c"]),
    ],
)
def test_clips_and_placeholders_must_match(model, clips, question):
    with pytest.raises(PromptError) as caught:
        model.ask(clips, question)
    assert "\n" not in str(caught.value)


def test_bad_audio_names_the_file(model, tmp_path):
    path = tmp_path / "text.wav"
    path.write_text("this is no sound")
    with pytest.raises(AudioError, match=r"text\.wav"):
        model.ask(path, QUESTION)


def test_file_bytes_and_array_are_the_same_clip(model, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(0.7).numpy(), 16_000, subtype="FLOAT")
    expected = model.ask(path, QUESTION)
    assert model.ask(str(path), QUESTION) == expected
    assert model.ask(path.read_bytes(), QUESTION) == expected
    assert model.ask(clip(0.7), QUESTION) == expected


def test_other_rates_and_channels(model):
    t = np.arange(44_100) / 44_100
    stereo = np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 660 * t)], axis=1).astype(np.float32)
    (answer,) = model.ask_detailed((stereo, 44_100), QUESTION)
    assert answer.audio_seconds == pytest.approx(1.0)
    assert answer.audio_tokens == 25


def test_the_model_hears(model):
    """Silence, a clip and another clip give different logits; a deaf model would not notice."""
    row = [encode(model.tokenizer, [user_turn(QUESTION, 1)], [0])]
    clips = [torch.zeros(16_000), noise(1.0), tone(1.0, 700.0)]
    logits = [model.llm(model.inputs([samples], row)).logits[0, -1] for samples in clips]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (logits[i] - logits[j]).abs().max() > 1e-2


def test_loss_is_the_answers_alone(model):
    from pal.types import Batch

    turns = [user_turn(QUESTION, 1), {"role": "assistant", "content": "a loud siren"}]
    row = encode(model.tokenizer, turns, [0], train=True)
    total, tokens = model.loss(Batch([noise(0.5)], [row]))
    inputs = model.inputs([noise(0.5)], [row])
    log_p = model.llm(inputs).logits[0, :-1].log_softmax(-1)
    labels = inputs.labels_BT[0, 1:]
    trained = labels != -100
    assert tokens == int(trained.sum()) == len(model.tokenizer(" a loud siren")["input_ids"]) + 1
    expected = -log_p[trained].gather(1, labels[trained][:, None]).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(model.answer_scores([noise(0.5)], [row])[0], -expected)


def test_frozen_parts_stay_in_evaluation_mode(model):
    other = tiny_model(model.config.integration)
    other.ears.encoders.requires_grad_(False)
    other.train()
    assert not other.ears.encoders[0].training
    assert other.ears.connectors[0].training
    assert not any(module.training for module in other.ears.encoders[0].modules())


def test_statistics_without_weights_move_only_in_a_part_that_is_trained_whole():
    other = tiny_model()
    encoder = other.ears.encoders[0]
    encoder.norm_alone = torch.nn.BatchNorm1d(4, affine=False)
    other.train()
    assert encoder.norm_alone.training
    next(encoder.parameters()).requires_grad_(False)
    other.train()
    assert encoder.training and not encoder.norm_alone.training


def test_an_end_that_the_llm_has_no_row_for_is_no_end():
    """Trap: tokenizers, such as Gemma3's, may have more entries than the LLM has rows."""
    other = tiny_model()
    ends = other.generation_options()["eos_token_id"]
    while len(other.tokenizer) <= other.llm.vocab:
        other.tokenizer.add_tokens([f"<{len(other.tokenizer)}>"])
    other.tokenizer.eos_token = f"<{len(other.tokenizer) - 1}>"
    assert other.tokenizer.eos_token_id >= other.llm.vocab
    assert other.generation_options()["eos_token_id"] == ends
    assert other.generation_options()["pad_token_id"] < other.llm.vocab


def test_digest_follows_every_number():
    """Buffers too: the batch statistics of an encoder decide what it hears as its weights do."""
    model = tiny_model("lal", warm=False)
    digest = model.digest
    assert set(dict(model.named_buffers())) & set(model.state_dict())
    for tensor in model.state_dict().values():
        place = (-1,) * tensor.dim()
        before = tensor[place].clone()
        tensor[place] += 1
        assert model.digest != digest
        tensor[place] = before
    assert model.digest == digest


def test_digest_follows_the_weights(model):
    other = tiny_model(model.config.integration)
    assert other.digest == model.digest
    with torch.no_grad():
        next(other.ears.connectors.parameters())[0] += 1e-3
    assert other.digest != model.digest


def test_attach_names_the_known_parts():
    with pytest.raises(ConfigError, match=r"unknown encoder 'wisper'; known: .*whisper"):
        pal.attach(llm={"fresh": LLM, "tokenizer": "x"}, encoders=["wisper"])
    with pytest.raises(ConfigError, match="unknown key 'encoder'; known: "):
        pal.attach(llm="x", encoders=["tiny"], encoder="tiny")


def test_attach_to_an_llm_on_disk(tmp_path):
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    model = pal.attach(llm=str(tmp_path / "llm"), encoders=["tiny"], connector="qformer", integration="lal")
    assert isinstance(model.ask(clip(0.4), QUESTION), str)
    ours, theirs = model.llm.state_dict(), donor.llm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_after_an_integration_asks_which_it_is():
    """The contract: outside their own package no code compares names or classes of integrations."""
    import pal.backbone.llm
    import pal.model
    import pal.train.trainer

    for module in (pal.model, pal.backbone.llm, pal.train.trainer):
        source = inspect.getsource(module)
        for name in ("PLITS", "LAL", "Hybrid", '"plits"', '"lal"'):
            assert name not in source.replace("integrations with LAL", ""), f"{module.__name__} mentions {name}"


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("openai/whisper-large-v3", "whisper"),
        ("somebody/whisper-of-theirs", "whisper"),
        ("nvidia/audio-flamingo-3-hf", "af_whisper"),
        ("laion/clap-htsat-fused", "clap"),
        ("laion/larger_clap_general", "clap"),
        ("ta012/SSLAM_pretrain", "sslam"),
        ("MIT/ast-finetuned-audioset-10-10-0.4593", "ast"),
    ],
)
def test_a_hub_id_alone_names_its_encoder(hub_id, name):
    config = parse(ModelConfig, {"llm": "a/b", "encoders": [hub_id]}, where="test")
    assert config.encoders == [{"name": name, "path": hub_id}]


def test_every_form_of_a_clip_gives_the_same_answer(tmp_path):
    model = tiny_model("lal")
    samples_N, rate = clip(0.6)
    path = tmp_path / "a clip.wav"
    soundfile.write(path, samples_N, rate, subtype="FLOAT")
    expected = model.ask((samples_N, rate), QUESTION, max_new_tokens=4)
    forms = [
        *(str(path), {"bytes": path.read_bytes(), "path": None}, {"array": samples_N, "sampling_rate": rate}),
        *((torch.from_numpy(samples_N)[None], rate), torch.from_numpy(samples_N), (rate, samples_N)),
    ]
    for form in forms:
        assert model.ask(form, QUESTION, max_new_tokens=4) == expected
        assert model.ask_detailed(form, QUESTION, max_new_tokens=4)[0].text == expected
        assert model.ask(model.index(form), QUESTION, max_new_tokens=4) == expected
    assert model.ask(forms, QUESTION, max_new_tokens=4) == [expected] * len(forms)
    for asking in (model.ask, model.ask_detailed, lambda address, _, **options: model.index(address, **options)):
        with pytest.raises(AudioError, match="URLs are not fetched; pass allow_urls=True"):
            asking(path.as_uri(), QUESTION)
        assert asking(path.as_uri(), QUESTION, allow_urls=True)


def test_numbers_and_parts_are_one_line(model):
    with pytest.raises(AudioError, match="a list of numbers is no clip"):
        model.ask([0.1] * 1000, QUESTION)
    with pytest.raises(PromptError, match="chats with parts go to the processor"):
        model.ask(clip(0.2), [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])


def test_losses_and_scores_are_packed_where_the_llm_packs():
    model = tiny_model("lal")
    packed = []
    model.integration.register_forward_hook(
        lambda module, given, inputs: packed.append(isinstance(inputs.audio_context, PackedContext))
    )
    rows = [Tokens([5, AUDIO, 6], [0], [IGNORE, IGNORE, 6])]
    for model.llm.packs in (False, True):
        model.loss(Batch([noise(0.3)], rows))
        model.answer_scores([noise(0.3)], rows)
    assert packed == [False] * 2 + [True] * 2
