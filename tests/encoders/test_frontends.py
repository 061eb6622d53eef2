"""What the host makes of clips before an encoder's network runs: frames, in blocks, by as few calls as give the same."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from pal.encoders import base
from pal.encoders.base import Encoder
from pal.registry import build, names, toy
from pal.types import Frames

ENCODERS = names("encoder")
every = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    torch.manual_seed(0)
    return {name: build("encoder", toy("encoder", name)).eval() for name in ENCODERS}


def clip(samples: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def clips(encoder: Encoder, *seconds: float) -> list[Tensor]:
    return [clip(max(1, round(s * encoder.sampling_rate)), at) for at, s in enumerate(seconds)]


@every
def test_windows_together_have_the_frames_they_have_alone(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    whole = encoder.window_seconds or 1.5
    windows = clips(encoder, whole, 0.4, whole, 0.7 * whole, 0.4, 0.0001, whole - 0.011)
    windows.append(torch.zeros(1234))  # the loudest frame of a clip sets the floor of that clip alone, in Whisper
    windows.append(3 * clip(5000, 9))
    together = encoder.frontends(windows)
    for samples_N, frames_FM in zip(windows, together, strict=True):
        assert_close(frames_FM, encoder.frontend(samples_N), atol=1e-6, rtol=1e-6)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 16_000), min_size=1, max_size=6))
@pytest.mark.parametrize("name", ["tiny", "whisper", "beats"])
def test_so_do_windows_of_any_lengths(encoders: dict[str, Encoder], name: str, lengths: list[int]) -> None:
    windows = [clip(n, at) for at, n in enumerate(lengths)]
    for samples_N, frames_FM in zip(windows, encoders[name].frontends(windows), strict=True):
        assert_close(frames_FM, encoders[name].frontend(samples_N), atol=1e-6, rtol=1e-6)


@every
def test_frames_made_ahead_give_the_features_of_the_waveforms(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    given_clips = clips(encoder, 0.3, 2.3 * (encoder.window_seconds or 1.0), 0.8)
    with torch.no_grad():
        expected = encoder.encode(given_clips)
        ahead = encoder.encode(encoder.prepare(given_clips))
    assert torch.equal(ahead.x_BAE, expected.x_BAE) and ahead.lengths == expected.lengths


@every
def test_a_network_of_half_precision_takes_the_same_frames(encoders: dict[str, Encoder], name: str) -> None:
    half = copy.deepcopy(encoders[name]).bfloat16()
    frames = half.prepare(clips(half, 0.8))
    assert all(x_WFM.dtype == torch.float32 for x_WFM in frames.blocks_WFM)
    with torch.no_grad():
        assert half.encode(frames).x_BAE.dtype == torch.bfloat16


@every
def test_each_window_is_there_once_and_whole(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    window = encoder.window_seconds
    given_clips = clips(encoder, *([0.2] * 17), 1.0 if window is None else 2.5 * window)
    frames = encoder.prepare(given_clips)
    assert frames.windows == (1,) * 17 + (1 if window is None else 3,)
    sizes = [len(lengths) for lengths in frames.lengths]
    assert sizes == ([18] if window is None else [16, 4])
    flat = [x_FM[:n] for x_WFM, lengths in blocks(frames) for x_FM, n in zip(x_WFM, lengths, strict=True)]
    cut = [part for samples_N in given_clips for part in windows_of(encoder, samples_N)]
    assert len(flat) == len(cut)
    for frames_FM, alone_FM in zip(flat, encoder.frontends(cut), strict=True):
        assert_close(frames_FM, alone_FM, atol=1e-6, rtol=1e-6)
    for x_WFM, lengths in blocks(frames):
        assert x_WFM.shape[1] == max(lengths) and x_WFM.device.type == "cpu"
        for x_FM, n in zip(x_WFM, lengths, strict=True):
            assert not x_FM[n:].any()


def blocks(frames: Frames) -> list[tuple[Tensor, tuple[int, ...]]]:
    return list(zip(frames.blocks_WFM, frames.lengths, strict=True))


def windows_of(encoder: Encoder, samples_N: Tensor) -> tuple[Tensor, ...]:
    if encoder.window_seconds is None:
        return (samples_N,)
    return samples_N.split(round(encoder.window_seconds * encoder.sampling_rate))


# How often a transform or an extractor is called


class Calls:
    """Counts what all front-ends end in."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.stft, self.rfft, self.extract = torch.stft, torch.fft.rfft, WhisperFeatureExtractor.__call__
        patch.setattr(torch, "stft", self._stft)
        patch.setattr(torch.fft, "rfft", self._rfft)
        patch.setattr(WhisperFeatureExtractor, "__call__", lambda *a, **k: self._extract(*a, **k))

    def _stft(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.sizes.append(x.numel())
        return self.stft(x, *args, **options)

    def _rfft(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.sizes.append(x.numel())
        return self.rfft(x, *args, **options)

    def _extract(self, extractor: Any, waves: Any, **options: Any) -> Any:
        before = len(self.sizes)
        found = self.extract(extractor, waves, **options)
        self.sizes[before:] = [sum(map(len, waves))]
        return found


@every
def test_a_batch_of_windows_is_one_call(
    encoders: dict[str, Encoder], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders[name]
    calls = Calls(monkeypatch)
    # as long as the budget of one call lets be in CLAP's windows, which are all filled up to ten seconds
    encoder.prepare(clips(encoder, *([1.0] * 8)))
    assert len(calls.sizes) == 1


def test_lengths_that_differ_need_no_more_calls_where_frames_stand_alone(
    encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    for name in ("tiny", "ast", "sslam", "beats", "clap"):
        calls.sizes.clear()
        encoders[name].prepare(clips(encoders[name], 0.3, 1.1, 0.72, 0.9))
        assert len(calls.sizes) == 1, name
    for name in ("whisper", "af_whisper"):  # one for each begun second
        calls.sizes.clear()
        encoders[name].prepare(clips(encoders[name], 0.3, 1.1, 0.72, 0.9, 1.4))
        assert len(calls.sizes) == 2, name


@every
def test_hours_of_audio_go_through_in_pieces(
    encoders: dict[str, Encoder], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders[name]
    window = encoder.window_seconds or 1.0
    given_clips = clips(encoder, window, 3.5 * window, 0.5)
    expected = encoder.prepare(given_clips)
    monkeypatch.setattr(base, "SAMPLES_AT_ONCE", round(2 * window * encoder.sampling_rate))
    monkeypatch.setattr(base, "WINDOWS_AT_ONCE", 2)
    groups: list[int] = []
    made = type(encoder).frontends

    def watching(self: Encoder, windows: Any) -> list[Tensor]:
        groups.append(sum(map(len, windows)))
        return made(self, windows)

    monkeypatch.setattr(type(encoder), "frontends", watching)
    frames = encoder.prepare(given_clips)
    # a clip that an encoder takes whole is never cut, however long
    assert max(groups) <= max(base.SAMPLES_AT_ONCE, max(len(x) for x in given_clips) * (encoder.window_seconds is None))
    assert len(groups) >= 2 and sum(groups) == sum(map(len, given_clips))
    assert all(len(lengths) <= 2 for lengths in frames.lengths) or encoder.window_seconds is None
    assert frames.windows == expected.windows and sum(frames.lengths, ()) == sum(expected.lengths, ())
    with torch.no_grad():
        assert_close(encoder.encode(frames).x_BAE, encoder.encode(expected).x_BAE, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_only_knows_single_windows_will_do() -> None:
    class Plain(Encoder):
        sampling_rate, width, seconds_per_token = 10, 1, 0.1

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def frontend(self, samples_N: Tensor) -> Tensor:
            return samples_N[:, None]

        def forward(self, frames_WFM: Tensor, lengths: Any) -> Any:
            raise AssertionError

    frames = Plain().prepare([clip(3), clip(5)])
    assert frames.lengths == ((3, 5),)
    assert torch.equal(frames.blocks_WFM[0][1, :, 0], clip(5))
