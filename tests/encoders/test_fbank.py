"""Kaldi's filter bank, against transformers' extractor and against the formula."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import ASTFeatureExtractor

from pal.encoders.fbank import fbank, hops, whole_frames

EXTRACTOR = ASTFeatureExtractor(do_normalize=False, max_length=1024)


def clip(length: int, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(length).normal(0, level, length).astype(np.float32))


def by_transformers(samples_N: Tensor) -> Tensor:
    """Frames [1024, M]; zeros behind the real ones."""
    return torch.from_numpy(np.asarray(EXTRACTOR(samples_N.numpy(), sampling_rate=16_000)["input_values"][0]))


def by_the_formula(samples_N: Tensor, mels: int, power: float) -> Tensor:
    """Kaldi's steps one after another for each frame and bin, with a Fourier sum for each frequency."""

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    window_N = [(0.5 - 0.5 * math.cos(2 * math.pi * n / 399)) ** power for n in range(400)]
    frames = 1 + (len(samples_N) - 400) // 160
    out_FM = torch.zeros(frames, mels)
    step = (mel(8000) - mel(20)) / (mels + 1)
    fourier_XN = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    for frame in range(frames):
        x_N = samples_N[160 * frame : 160 * frame + 400].double().numpy()
        x_N = x_N - x_N.mean()
        x_N = np.array([x_N[n] - 0.97 * x_N[max(n - 1, 0)] for n in range(400)]) * window_N
        power_X = np.abs(fourier_XN @ x_N) ** 2
        for bin in range(mels):
            left = mel(20) + bin * step
            rising_X = (np.array([mel(31.25 * x) for x in range(257)]) - left) / step
            weight_X = np.clip(np.minimum(rising_X, 2 - rising_X), 0, None)
            out_FM[frame, bin] = math.log(max(float(weight_X @ power_X), 1.1920928955078125e-07))
    return out_FM


@pytest.mark.parametrize("length", [400, 560, 16_080, 163_760])
@pytest.mark.parametrize("level", [1e-4, 1.0])
def test_equals_transformers_where_the_last_frame_is_full(length: int, level: float) -> None:
    frames_FM = fbank(clip(length, level))
    assert len(frames_FM) == (length - 400) // 160 + 1
    assert_close(frames_FM, by_transformers(clip(length, level))[: len(frames_FM)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 239, 399, 401, 559, 16_000, 80_000])
def test_otherwise_it_equals_transformers_with_zeros_in_the_last_frame(length: int) -> None:
    samples_N = clip(length)
    frames_FM = fbank(samples_N)
    full_N = torch.nn.functional.pad(samples_N, (0, 400 + 160 * (len(frames_FM) - 1) - length))
    assert 0 < len(full_N) - length < 400
    assert_close(frames_FM, by_transformers(full_N)[: len(frames_FM)], atol=1e-4, rtol=0)
    if length >= 400:  # Kaldi's own frames, all but the last
        kaldi = (length - 400) // 160 + 1
        assert kaldi == len(frames_FM) - 1
        assert_close(frames_FM[:kaldi], by_transformers(samples_N)[:kaldi], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("window", "power"), [("hanning", 1.0), ("povey", 0.85)])
@pytest.mark.parametrize(("mels", "scale"), [(24, 1.0), (128, 2.0**15)])
def test_equals_the_formula(window: str, power: float, mels: int, scale: float) -> None:
    samples_N = clip(400 + 3 * 160)
    expected_FM = by_the_formula(scale * samples_N, mels, power)
    assert_close(fbank(samples_N, mels, window, scale), expected_FM, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 400, 401, 560, 2_559, 2_560, 2_561, 163_840])
def test_the_last_sample_is_heard(length: int) -> None:
    click_N = torch.zeros(length)
    click_N[-1] = 1
    assert (fbank(click_N) - fbank(torch.zeros(length))).abs().max() > 1


def test_frames_that_are_asked_for_go_on_in_silence() -> None:
    samples_N = clip(1_000)
    assert_close(fbank(samples_N, frames=9)[: whole_frames(1_000)], fbank(samples_N))
    assert_close(fbank(samples_N, frames=9)[-1], torch.full((128,), math.log(1.1920928955078125e-07)))


def test_counts_of_frames() -> None:
    for length in range(1, 3_000):
        whole = whole_frames(length)
        assert 160 * (whole - 1) + 400 >= length  # holds all
        assert whole == 1 or 160 * (whole - 2) + 400 < length  # and one fewer would not
        assert 0 <= hops(length) - whole <= 2
        assert 160 * (hops(length) - 1) < length <= 160 * hops(length)
