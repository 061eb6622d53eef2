"""Several encoders in one model: who takes what, rates, training, bundles, answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pal
from pal.audio import resample
from pal.data.prompts import encode, user_turn
from pal.encoders.base import Encoder
from pal.encoders.tiny import Tiny
from pal.errors import ConfigError
from pal.registry import lookup, register, unregister
from pal.train.recipe import Trained
from pal.train.stages import freeze
from tests.models import ENCODER, noise, tiny_model

QUESTION = "What sound is this?"
RATE = 24_000


@pytest.fixture(scope="module", autouse=True)
def fine():
    """Another encoder, at a higher rate and twice as many tokens a second."""

    @register("encoder", "fine")
    class Fine(Tiny):
        sampling_rate = RATE
        seconds_per_token = Tiny.seconds_per_token * 2 / 3  # the same hop in samples at 3/2 of the rate

        Config = Tiny.Config

    yield
    unregister("encoder", "fine")


FINE = ENCODER | {"name": "fine", "width": 10}
LFST = {"name": "lfst", "width": 16, "heads": 2, "layers": 1}
ENSEMBLES = {
    "each its own": {"encoders": [ENCODER, FINE], "connector": "mlp"},
    "a list": {"encoders": [ENCODER, FINE], "connector": [{"name": "mlp"}, {"name": "strided_conv"}]},
    "fused": {"encoders": [ENCODER, FINE], "connector": LFST},
    "three": {
        "encoders": [ENCODER, FINE, ENCODER],
        "connector": [{"name": "mlp", "encoders": [1]}, LFST | {"encoders": [2, 0]}],
    },
}
every = pytest.mark.parametrize("name", ENSEMBLES)
both = pytest.mark.parametrize("integration", ["pal", {"name": "pal_routed", "routes": {"fine": "plits"}}])


def clip(seconds, seed=0):
    return (noise(seconds, seed, RATE).numpy(), RATE)


@pytest.mark.covering(1)
@both
@every
def test_a_batch_gives_the_single_answers(name, integration):
    model = tiny_model(integration, **ENSEMBLES[name])
    clips = [clip(0.2 + 0.3 * i, i) for i in range(5)]
    together = model.ask(clips, QUESTION, max_new_tokens=8)
    assert together == [model.ask(one, QUESTION, max_new_tokens=8) for one in clips]
    assert len(set(together)) > 1


@pytest.mark.covering(1)
@both
@every
def test_bundles_and_indexed_clips_answer_alike(name, integration, tmp_path):
    model = tiny_model(integration, **ENSEMBLES[name])
    model.save_pretrained(tmp_path / "model")
    again = pal.load(tmp_path / "model")
    assert again.digest == model.digest
    assert again.ask(clip(1.3), QUESTION) == model.ask(clip(1.3), QUESTION)
    stored = model.index(clip(1.3))
    (direct,), (indexed,) = model.ask_detailed(clip(1.3), QUESTION), model.ask_detailed(stored, QUESTION)
    assert (direct.text, direct.audio_tokens) == (indexed.text, indexed.audio_tokens)
    assert direct.audio_seconds == direct.audio_seconds_used == indexed.audio_seconds_used == pytest.approx(1.3)


def test_each_encoder_is_given_its_own_rate():
    model = tiny_model("lal", **ENSEMBLES["each its own"])
    assert model.sampling_rate == RATE
    samples_N = noise(1.0, 3, RATE)
    heard = model.ears.encode([samples_N])
    lower = resample(samples_N, RATE, 16_000)
    assert lower.shape == (16_000,)
    with torch.no_grad():
        torch.testing.assert_close(heard[0].x_BAE, model.ears.encoders[0].encode([lower]).x_BAE)
        torch.testing.assert_close(heard[1].x_BAE, model.ears.encoders[1].encode([samples_N]).x_BAE)


def test_resampling_keeps_a_tone_and_the_shortest_clip():
    tone_N = torch.sin(2 * np.pi * 440 * torch.arange(RATE) / RATE)
    lower_N = resample(tone_N, RATE, 16_000)
    expected_N = torch.sin(2 * np.pi * 440 * torch.arange(16_000) / 16_000)
    torch.testing.assert_close(lower_N[500:-500], expected_N[500:-500], atol=1e-3, rtol=0)
    assert len(resample(torch.ones(1), 48_000, 16_000)) == 1


def test_both_encoders_are_heard():
    model = tiny_model("lal", **ENSEMBLES["each its own"])
    rows = [encode(model.tokenizer, [user_turn(QUESTION, 1)], [0])]
    heard = model.ears.encode([noise(1.0, 0, RATE)])
    other = model.ears.encode([noise(1.0, 1, RATE)])

    def logits(streams):
        with torch.no_grad():
            return model.llm(model.integration(model.ears.connect(streams), rows, model.llm)).logits[0, -1]

    base = logits(heard)
    for changed in ([other[0], heard[1]], [heard[0], other[1]]):
        assert (logits(changed) - base).abs().max() > 1e-3


def test_some_of_the_encoders_train():
    model = tiny_model("lal", **ENSEMBLES["each its own"])
    trained = freeze(model, Trained(encoder=[1]))
    assert set(trained) == {"encoder"}
    assert all(name.startswith("ears.encoders.1.") for name in trained["encoder"])
    model.train()
    assert not model.ears.encoders[0].training and model.ears.encoders[1].training
    with pytest.raises(ConfigError, match="encoders 0 to 1"):
        freeze(model, Trained(encoder=[2]))


@pytest.mark.parametrize(
    "connector, message",
    [
        ([{"name": "mlp"}], "takes? the encoders"),
        ([{"name": "mlp"}, {"name": "mlp", "encoders": [0]}], "there are 2"),
        ([{"name": "mlp"}, {"name": "mlp", "encoders": [2]}], "there are 2"),
        ([{"name": "mlp", "encoders": [0, 1]}], "takes 1 encoders, not 2"),
        ([LFST], "takes 2 encoders, not 1"),
        ([{"name": "mlp", "width": 0.5}, {"name": "mlp"}], "width"),
        ([{}, {"name": "mlp"}], "unknown connector ''"),
        ([{"name": "mlp", "encoders": 0}, {"name": "mlp"}], "list of numbers"),
    ],
)
def test_connectors_that_do_not_fit_are_refused(connector, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_model("lal", encoders=[ENCODER, FINE], connector=connector)
    assert "\n" not in str(error.value)


def test_a_fusing_connector_needs_its_encoders():
    with pytest.raises(ConfigError, match="takes 2 encoders, not 3"):
        tiny_model("lal", encoders=[ENCODER, FINE, ENCODER], connector=LFST)
    assert issubclass(lookup("encoder", "fine"), Encoder)
