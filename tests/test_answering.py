"""Options and questions of users: what cannot be followed is one line, before anything is generated."""

import pytest
import torch

from pal.answering import generation_options
from pal.errors import PalError, PromptError
from tests.models import noise, tiny_model

QUESTION = "What is heard?"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def clip():
    return noise(0.2, 0).numpy(), 16_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_tokens": 3}, "unknown option 'max_tokens'"),
        ({"attention_mask": torch.ones(1, 3)}, "unknown option 'attention_mask'"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "3"}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "top_p": -0.5}, "top_p"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"stop_strings": [1]}, "generate: "),
        ({"streamer": object()}, "streamer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_followed_are_one_line(model, clip, options, says):
    for ask in (model.ask, model.ask_detailed, lambda *given, **more: model.ask(*given, stream=True, **more)):
        with pytest.raises(PalError) as caught:
            ask(clip, QUESTION, **options)
        text = str(caught.value)
        assert says in text and text.isprintable() and len(text) <= 300


def test_beams_are_not_streamed(model, clip):
    with pytest.raises(PalError, match="num_beams cannot be used with stream=True"):
        model.ask(clip, QUESTION, stream=True, num_beams=2)
    assert isinstance(model.ask(clip, QUESTION, num_beams=2, max_new_tokens=2), str)


def test_the_callers_logits_processor_is_followed(model, clip):
    def lowest(ids, scores):
        return -scores

    options = {"logits_processor": [lowest], "max_new_tokens": 3}
    detailed = model.ask_detailed(clip, QUESTION, **options)[0]
    assert detailed.text == model.ask(clip, QUESTION, **options) != model.ask(clip, QUESTION, max_new_tokens=3)
    assert detailed.seconds["prefill"] > 0
    assert options["logits_processor"] == [lowest]


def test_stop_strings_end_an_answer(model, clip):
    whole = model.ask(clip, QUESTION, max_new_tokens=8)
    stop = whole[0]
    asked = {"max_new_tokens": 8, "stop_strings": [stop]}
    short = model.ask(clip, QUESTION, **asked)
    assert whole.startswith(short) and stop in short and len(short) < len(whole)
    assert model.ask_detailed(clip, QUESTION, **asked)[0].text == short
    assert "".join(model.ask(clip, QUESTION, stream=True, **asked)).strip() == short


def test_options_that_are_fine_go_on_as_they_are(model):
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "use_cache": False}
    assert generation_options(options, model.tokenizer) == options


@pytest.mark.parametrize("question", [None, 3, {"role": "user", "content": "a"}, ["a", None], b"a"], ids=str)
def test_questions_that_are_no_text_are_one_line(model, clip, question):
    with pytest.raises(PromptError, match="a question is a text, or a list of chat turns"):
        model.ask(clip, question)


def test_turns_that_are_none_are_one_line(model, clip):
    for turn in (None, "a", {"content": "a"}):
        with pytest.raises(PromptError, match="a question is a text, or a list of chat turns"):
            model.ask(clip, [{"role": "user", "content": "a"}, turn])


def test_a_tuple_is_several_questions(model, clip):
    assert model.ask(clip, ("a", "b"), max_new_tokens=2) == model.ask(clip, ["a", "b"], max_new_tokens=2)


def test_half_a_character_is_one_line(model, clip):
    for question in ("a\udcff", [{"role": "user", "content": "<audio>a\ud800"}]):
        with pytest.raises(PromptError, match="half of a surrogate pair"):
            model.ask(clip, question)
