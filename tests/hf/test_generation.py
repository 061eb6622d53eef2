"""Generation and pipelines beside `ask`."""

import pytest
import soundfile
import torch
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    TextIteratorStreamer,
    pipeline,
)

from pal.data.prompts import encode, user_turn
from pal.errors import PalError
from pal.hf import PalForConditionalGeneration, PalProcessor
from pal.registry import toy
from tests.hf.chats import QUESTION, chat, new_ids, one_kind, say, tensors
from tests.models import WORDS, noise, tiny_model


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 9},
        {"num_beams": 3, "max_new_tokens": 9},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 9},
    ],
)
def test_generation_equals_the_models_own(pair, options):
    model, auto, processor = pair
    rows = [encode(model.tokenizer, [user_turn(q, 1)], [i]) for i, q in enumerate([QUESTION, " ".join(WORDS)])]
    torch.manual_seed(3)
    expected = model.generate([noise(0.4), noise(0.9, 1)], rows, **options)
    inputs = tensors(processor, chat(0.4), chat(0.9, 1, " ".join(WORDS)))
    torch.manual_seed(3)
    made = auto.generate(**inputs, **options)
    count = options.get("num_return_sequences", 1)
    assert made[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"].repeat_interleave(count, 0))
    texts = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == expected
    assert len(set(expected)) > 1, "both rows say the same, so this shows little"


def check_answers(model, auto, processor):
    """A padded batch answers as its rows alone do, and as `ask` does."""
    questions = [" ".join(WORDS[: i + 1]) for i in range(3)]
    chats = [chat(0.2 + 0.3 * i, i, question) for i, question in enumerate(questions)]
    together = new_ids(auto, tensors(processor, *chats), max_new_tokens=8)
    answers = []
    for i, (ids, messages) in enumerate(zip(together, chats, strict=True)):
        alone = new_ids(auto, tensors(processor, messages), max_new_tokens=8)[0]
        assert ids[: len(alone)].equal(alone)
        answers.append(model.ask((noise(0.2 + 0.3 * i, i).numpy(), 16_000), questions[i], max_new_tokens=8))
    assert [text.strip() for text in processor.batch_decode(together, skip_special_tokens=True)] == answers
    assert len(set(answers)) > 1, "all say the same, so this shows little"


def test_answers_are_those_of_ask(pair):
    check_answers(*pair)


def test_answers_of_fused_encoders_at_another_rate(tmp_path):
    encoders = [toy("encoder", "clap"), toy("encoder", "sslam")]
    model = tiny_model("pal", encoders=encoders, connector=toy("connector", "lfst"))
    model.save_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert processor.sampling_rate == 48_000
    check_answers(model, AutoModelForMultimodalLM.from_pretrained(tmp_path / "m"), processor)


@one_kind
def test_lengths_count_a_clip_as_one_id(pair):
    _, auto, processor = pair
    inputs = tensors(processor, chat(1.5))
    width = inputs["input_ids"].shape[1]
    made = auto.generate(**inputs, max_length=width + 3, min_length=width + 3)
    assert made.shape == (1, width + 3)
    assert auto.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=2)).shape[1] <= width + 2
    with pytest.raises(PalError, match="leaves no room"):
        auto.generate(**inputs, max_length=width)


@one_kind
def test_scores_and_streams(pair):
    _, auto, processor = pair
    inputs = tensors(processor, chat(0.7))
    plain = auto.generate(**inputs, max_new_tokens=6)
    full = auto.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert full.sequences.equal(plain)
    assert len(full.scores) == plain.shape[1] - inputs["input_ids"].shape[1]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    auto.generate(**inputs, max_new_tokens=6, streamer=streamer)
    new = plain[:, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == processor.batch_decode(new, skip_special_tokens=True)[0]


def test_the_models_own_options_are_kept(tmp_path):
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    wrapped.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    wrapped.generation_config.max_new_tokens = 3
    wrapped.save_pretrained(tmp_path / "m")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    inputs = tensors(PalProcessor.of(wrapped.pal), chat(0.7))
    assert loaded.generation_config.max_new_tokens == 3
    assert new_ids(loaded, inputs).equal(new_ids(wrapped, inputs))
    assert new_ids(loaded, inputs, min_new_tokens=3).shape[1] == 3


@one_kind
def test_pipeline(pair, tmp_path):
    model, auto, _ = pair
    pipe = pipeline("any-to-any", model=auto.config.name_or_path, device="cpu")
    soundfile.write(tmp_path / "a.wav", noise(0.8).numpy(), 16_000, subtype="FLOAT")
    messages = [say({"type": "audio", "path": str(tmp_path / "a.wav")}, QUESTION)]
    expected = model.ask(tmp_path / "a.wav", QUESTION, max_new_tokens=8)
    (found,) = pipe(text=messages, max_new_tokens=8, return_full_text=False)
    assert found["generated_text"].strip() == expected
    (whole,) = pipe(text=messages, max_new_tokens=8)
    assert whole["generated_text"][-1]["role"] == "assistant"
    assert whole["generated_text"][-1]["content"].strip() == expected
    several = pipe(text=[messages, messages], max_new_tokens=8, return_full_text=False)
    assert [one[0]["generated_text"].strip() for one in several] == [expected] * 2
    (plain,) = pipe({"text": f"<user><audio>{QUESTION}<assistant>", "audio": str(tmp_path / "a.wav")}, max_new_tokens=8)
    assert plain["generated_text"].split("<assistant>")[-1].strip() == expected
