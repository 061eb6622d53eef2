"""The objective `transcript`: tags read as words where the audio would stand."""

import pytest
import torch

from pal.config import parse
from pal.errors import ConfigError
from pal.train.objectives import MicroBatch, TranscriptLoss, build_objective
from pal.train.recipe import Stage
from pal.train.transcript import TranscriptRoute
from pal.types import AUDIO, IGNORE, Batch, TagSpan, Tokens
from tests.models import tiny_model

SPANS = [TagSpan("dog", 0.0, 0.4), TagSpan("cat", 0.2, 0.6)]


@pytest.fixture
def model():
    return tiny_model("plits")


def made(model, **options):
    return TranscriptRoute(parse(TranscriptRoute.Config, options, "test"), model, ["cat", "dog"])


def clip(seconds: float):
    return torch.zeros(round(seconds * 16_000))


def conversation(model, clips=(0,)):
    ids = [5, *[AUDIO] * len(clips), 6, 7, 8]
    return Tokens(ids, list(clips), [IGNORE] * (len(ids) - 2) + ids[-2:])


def embedded(model, word):
    ids = model.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    return model.llm.embed(torch.tensor(ids)).mean(0)


def test_a_row_is_the_sum_of_what_holds_then(model):
    transcript = made(model, seconds_per_row=0.2)
    batch = Batch([clip(0.8), clip(0.3)], [], tags=[SPANS, [TagSpan("dog")]])
    features = transcript.features(batch)
    assert features.lengths == (4, 2)
    rows_USD = transcript.inject(features, model.llm).rows_USD
    cat, dog = embedded(model, "cat"), embedded(model, "dog")
    expected = torch.stack([dog, dog + cat, cat, 0 * cat])
    torch.testing.assert_close(rows_USD[0], expected)
    torch.testing.assert_close(rows_USD[1, :2], torch.stack([dog, dog]))  # without times, throughout


def test_it_equals_the_llm_on_those_embeddings_at_audio_s_positions(model):
    transcript = made(model, seconds_per_row=0.2)
    batch = Batch([clip(0.6)], [conversation(model)], tags=[SPANS])
    inputs = transcript(transcript.features(batch), batch.conversations, model.llm)
    tokens = transcript.tokens
    assert tokens == round(0.2 / model.ears.encoders[0].seconds_per_token)
    positions = [0, *(1 + i * (tokens + 1) + tokens for i in range(3))]
    after = 1 + 3 * (tokens + 1)
    assert inputs.position_ids_BT.tolist() == [[*positions, after, after + 1, after + 2]]
    text = model.llm.embed(torch.tensor([5, 6, 7, 8]))
    cat, dog = embedded(model, "cat"), embedded(model, "dog")
    rows = torch.stack([text[0], dog, dog + cat, cat, *text[1:]])
    torch.testing.assert_close(inputs.inputs_embeds_BTD[0], rows)
    logits = model.llm.lm(
        inputs_embeds=rows[None], position_ids=inputs.position_ids_BT, attention_mask=torch.ones(1, 7)
    ).logits
    loss, answers = TranscriptLoss(
        model, parse(TranscriptRoute.Config, {"per": "answer"}, "test"), {"synth": {"cat", "dog"}}
    )(MicroBatch(batch, ["synth"], seed=0))[:2]
    assert answers == 1
    expected = torch.nn.functional.cross_entropy(logits[0, -3:-1], torch.tensor([7, 8]))
    torch.testing.assert_close(loss, expected)


def test_a_clip_of_which_nothing_is_known_is_refused(model):
    for tags in (None, [SPANS, None]):
        with pytest.raises(ConfigError, match="a clip has no tags; leave its source out"):
            made(model).features(Batch([clip(0.4), clip(0.4)], [], tags=tags))
    made(model).features(Batch([clip(0.4)], [], tags=[[]]))  # known to be silent


def test_only_the_llm_learns_from_it(model):
    options = {"name": "text", "objective": "transcript", "steps": 1, "batch": {"rows": 1}, "lr": 1e-3}
    stage = parse(Stage, {**options, "train": {"connector": True}}, "test")
    with pytest.raises(ConfigError, match=r"'transcript' has no audio and trains the LLM alone"):
        build_objective(model, stage, [])
    stage = parse(Stage, {**options, "train": {"llm": "full"}}, "test")
    with pytest.raises(ConfigError, match="no record of the stage's data has tags"):
        build_objective(model, stage, [])
    build = TranscriptLoss(model, parse(TranscriptRoute.Config, {}, "test"), {"synth": {"dog"}})
    build(MicroBatch(Batch([clip(0.6)], [conversation(model)], tags=[SPANS]), ["synth"], seed=0)).sum.backward()
    assert any(p.grad is not None for p in model.llm.parameters())
    assert all(p.grad is None for part in (model.ears, model.integration) for p in part.parameters())
