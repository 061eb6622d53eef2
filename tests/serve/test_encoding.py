"""Clips that wait together are encoded in one batch, with the keys and values that each has alone."""

import pytest
import torch
from torch.testing import assert_close

from pal.clips import Waveform
from pal.registry import names, toy
from pal.serve import encoding
from pal.serve.encoding import ClipEncoder
from pal.serve.lru import ByteLRU
from pal.serve.reading import EngineStats
from pal.serve.requests import EngineRequest, RequestClip
from pal.serve.sampling import SamplingOptions
from tests.models import noise, tiny_model, tone

SECONDS = (0.5, 0.81, 0.45, 0.6)


def requests(model, *clips):
    rate = model.sampling_rate
    given = [
        RequestClip(str(hash(one.numpy().tobytes())), Waveform(one, rate, len(one) / rate, "clip")) for one in clips
    ]
    return [EngineRequest(None, [clip], SamplingOptions(), lambda event: None) for clip in given]


def encoder_of(model, max_bytes=1 << 30):
    return ClipEncoder(model, model.digest, ByteLRU(max_bytes), EngineStats())


def batches(model, monkeypatch):
    """Numbers of clips that the model encodes at once, as they come."""
    found, features = [], type(model).features

    def counted(self, clips):
        found.append(len(clips))
        return features(self, clips)

    monkeypatch.setattr(type(model), "features", counted)
    return found


def waves(model, seconds=SECONDS):
    rate = model.sampling_rate
    return [
        noise(each, seed, rate) if seed % 2 else tone(each, 300.0 * (seed + 1), rate)
        for seed, each in enumerate(seconds)
    ]


@pytest.mark.parametrize(
    "integration", ["plits", "lal", "pal", {"name": "flamingo", "every": 2}, "lal_audio_query"], ids=str
)
def test_keys_and_values_are_those_of_each_clip_alone(integration, monkeypatch):
    check(tiny_model(integration), monkeypatch)


@pytest.mark.parametrize("name", names("encoder"))
def test_whatever_the_encoder(name, monkeypatch):
    check(tiny_model("pal", encoders=[toy("encoder", name)]), monkeypatch)


def check(model, monkeypatch):
    given = waves(model)
    counts = batches(model, monkeypatch)
    with torch.inference_mode():
        encoder = encoder_of(model)
        asked = requests(model, *given, given[0])
        encoded = encoder.of(asked)
        assert counts == [4]
        for one, samples_N in zip(asked, [*given, given[0]], strict=True):
            (made,) = encoded.take(one.clips, one.usage)
            alone = model.index((samples_N, model.sampling_rate))
            assert (made.tokens, made.seconds) == (alone.tokens, alone.seconds)
            for own, other in zip(made.streams, alone.streams, strict=True):
                assert own.lengths == other.lengths
                for name, x in own.tensors().items():
                    expected = other.tensors()[name]
                    real = x[tuple(slice(size) for size in expected.shape)]  # of PAL, a last group may be padded
                    assert_close(real, expected, atol=1e-4, rtol=1e-4)
                    assert x.untyped_storage().nbytes() == x.nbytes  # nothing of the batch is kept
    assert [one.usage.cached > 0 for one in asked] == [False, False, False, False, True]
    assert (encoder.stats.clip_misses, encoder.stats.clip_hits) == (4, 1)


def test_a_clip_that_cannot_be_encoded_fails_alone(monkeypatch):
    model = tiny_model("lal")
    good, bad, other = requests(model, *waves(model, (0.5, 0.6, 0.7)))
    features = type(model).features

    def failing(self, clips):
        if any(clip is bad.clips[0].clip for clip in clips):
            raise ZeroDivisionError
        return features(self, clips)

    monkeypatch.setattr(type(model), "features", failing)
    with torch.inference_mode():
        encoder = encoder_of(model)
        encoded = encoder.of([good, bad, other])
        assert all(encoded.take(one.clips, one.usage)[0].tokens for one in (good, other))
        with pytest.raises(ZeroDivisionError):
            encoded.take(bad.clips, bad.usage)
    assert encoder.stats.clip_misses == 2 and encoder.stored(bad.clips[0].digest) is None


def test_batches_have_clips_of_similar_length_and_a_most(monkeypatch):
    model = tiny_model("lal")
    counts = batches(model, monkeypatch)
    monkeypatch.setattr(encoding, "TOGETHER", 2)
    with torch.inference_mode():
        encoder_of(model).of(requests(model, *waves(model, (0.2, 4.0, 0.21, 0.22))))
    assert counts == [2, 1, 1]


def test_a_request_gets_clips_that_the_cache_has_no_room_for():
    model = tiny_model("lal")
    (one,) = requests(model, *waves(model, (0.5,)))
    with torch.inference_mode():
        encoder = encoder_of(model, max_bytes=1)
        (made,) = encoder.of([one]).take(one.clips, one.usage)
    assert made.tokens and encoder.stored(one.clips[0].digest) is None
