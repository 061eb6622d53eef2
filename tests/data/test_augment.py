"""Augmentation: the same generator gives the same clip, and tags stay where their sounds are."""

import numpy as np
import pytest
import torch

from pal.config import parse
from pal.data.augment import Augment, equalise, loudness, lowpass, noise, warp
from pal.errors import ConfigError
from pal.types import TagSpan

RATE = 16_000
EVERYTHING = {
    "probability": 0.7,
    "speed": [0.8, 1.25],
    "crop_seconds": 1.5,
    "pad_seconds": 2.0,
    "time_shift": 0.4,
    "lowpass": [2000, 7000],
    "gain_db": [-10, 10],
    "noise_db": [0, 30],
}


def augment(**options):
    return Augment(parse(Augment.Config, options, where="test"))


def burst(start: float, end: float, seconds: float = 2.0, hz: float = 1000.0) -> torch.Tensor:
    """A tone between two times, silence around it."""
    t = np.arange(round(seconds * RATE)) / RATE
    return torch.from_numpy((0.3 * np.sin(2 * np.pi * hz * t) * ((t >= start) & (t < end))).astype(np.float32))


def sounding(samples_N: torch.Tensor) -> tuple[float, float]:
    """Where a burst is, measured on the samples."""
    loud = torch.nonzero(samples_N.abs() > 0.03)[:, 0]
    return loud[0].item() / RATE, (loud[-1].item() + 1) / RATE


@pytest.mark.parametrize("seed", range(5))
def test_same_generator_same_clip(seed):
    x_N, tags = burst(0.5, 1.2), [TagSpan("tone", 0.5, 1.2), TagSpan("somewhere")]
    before = x_N.clone()
    a_N, a = augment(**EVERYTHING)(x_N, RATE, np.random.default_rng(seed), tags)
    b_N, b = augment(**EVERYTHING)(x_N, RATE, np.random.default_rng(seed), tags)
    other_N, _ = augment(**EVERYTHING)(x_N, RATE, np.random.default_rng(seed + 100), tags)
    assert torch.equal(a_N, b_N) and a == b
    assert a_N.shape != other_N.shape or not torch.equal(a_N, other_N)
    assert torch.equal(x_N, before) and len(tags) == 2


def test_off_by_default():
    x_N, tags = burst(0.5, 1.2), [TagSpan("tone", 0.5, 1.2)]
    y_N, after = augment()(x_N, RATE, np.random.default_rng(0), tags)
    assert torch.equal(x_N, y_N) and after == tags


@pytest.mark.parametrize(
    "options",
    [
        {"speed": [1.2, 1.3]},
        {"speed": [0.75, 0.8]},
        {"pad_seconds": 4.0},
        {"time_shift": 0.45},
        {"time_shift": 0.45, "wrap": True},
        {"speed": [0.8, 1.2], "pad_seconds": 3.0, "time_shift": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_tags_are_where_the_sound_is(options, seed):
    x_N = burst(0.6, 1.3)
    tags = [TagSpan("tone", 0.6, 1.3), TagSpan("somewhere")]
    y_N, after = augment(**options)(x_N, RATE, np.random.default_rng(seed), tags)
    assert after[1] == tags[1]
    start, end = sounding(y_N)
    assert after[0].start == pytest.approx(start, abs=2e-3)
    assert after[0].end == pytest.approx(end, abs=2e-3)
    # and the sound did move
    assert abs(start - 0.6) > 1e-4 or abs(end - 1.3) > 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_crop_cuts_tags(seed):
    y_N, after = augment(crop_seconds=0.8)(burst(0.6, 1.3), RATE, np.random.default_rng(seed), [TagSpan("t", 0.6, 1.3)])
    assert len(y_N) == round(0.8 * RATE)
    start, end = sounding(y_N)
    assert (after[0].start, after[0].end) == pytest.approx((start, end), abs=2e-3)


def test_tags_that_leave_are_dropped():
    tags = [TagSpan("early", 0.0, 0.1), TagSpan("late", 1.9, 2.0), TagSpan("always", 0.0, 2.0)]
    gone = set()
    for seed in range(20):
        y_N, after = augment(crop_seconds=0.5)(burst(0, 2), RATE, np.random.default_rng(seed), tags)
        assert all(0 <= tag.start < tag.end <= len(y_N) / RATE for tag in after)
        assert "always" in {tag.label for tag in after}
        gone |= {tag.label for tag in tags} - {tag.label for tag in after}
    assert gone == {"early", "late"}


def test_wrapping_splits_a_tag_and_keeps_every_sample():
    x_N, tags = burst(0.0, 1.0), [TagSpan("tone", 0.0, 1.0)]
    for seed in range(20):
        y_N, after = augment(time_shift=0.5, wrap=True)(x_N, RATE, np.random.default_rng(seed), tags)
        assert torch.equal(y_N.sort().values, x_N.sort().values)
        assert sum(tag.end - tag.start for tag in after) == pytest.approx(1.0, abs=0.051)
        for tag in after:
            inside_N = y_N[round(tag.start * RATE) : round(tag.end * RATE)]
            assert loudness(inside_N.numpy(), RATE) == pytest.approx(0.3 / 2**0.5, rel=0.05)


def test_speed_changes_length_and_pitch():
    y_N, _ = augment(speed=[1.25, 1.25])(burst(0, 2), RATE, np.random.default_rng(0), None)
    assert abs(len(y_N) - round(2 * RATE / 1.25)) <= 1
    spectrum = np.abs(np.fft.rfft(y_N.numpy()))
    assert np.fft.rfftfreq(len(y_N), 1 / RATE)[spectrum.argmax()] == pytest.approx(1250, abs=2)


def test_gain_and_full_scale():
    x_N = burst(0, 2)
    y_N, _ = augment(gain_db=[-6, -6])(x_N, RATE, np.random.default_rng(0), None)
    torch.testing.assert_close(y_N, x_N * 10 ** (-6 / 20))
    y_N, _ = augment(gain_db=[60, 60])(x_N, RATE, np.random.default_rng(0), None)
    assert y_N.abs().max().item() == pytest.approx(1.0, abs=1e-5)


def test_noise_has_the_ratio_that_was_asked():
    x_N = burst(0.5, 1.0)  # silence around it does not count
    y_N, _ = augment(noise_db=[12, 12])(x_N, RATE, np.random.default_rng(3), None)
    added = (y_N - x_N).square().mean().sqrt().item()
    assert 20 * np.log10(0.3 / 2**0.5 / added) == pytest.approx(12, abs=0.3)


def test_noise_colour_varies():
    def slope(seed):
        spectrum = np.abs(np.fft.rfft(noise(np.random.default_rng(seed), RATE, 0.1)))
        return np.mean(spectrum[4000:] ** 2) / np.mean(spectrum[200:1000] ** 2)

    slopes = [slope(seed) for seed in range(20)]
    assert min(slopes) < 0.05 and max(slopes) > 0.5


def test_lowpass_keeps_below_and_removes_above():
    low_N, high_N = burst(0, 2, hz=1000).numpy(), burst(0, 2, hz=5000).numpy()
    y_N = lowpass(low_N + high_N, RATE, 2500.0)
    # away from the ends, where the transform wraps around
    np.testing.assert_allclose(y_N[4000:-4000], low_N[4000:-4000], atol=2e-3)


@pytest.mark.parametrize("samples", [1, 7, 100, 30_001])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_never_nan_and_never_empty(samples, level):
    x_N = torch.full((samples,), level)
    for seed in range(6):
        y_N, tags = augment(**EVERYTHING)(x_N, RATE, np.random.default_rng(seed), None)
        assert y_N.dtype == torch.float32 and y_N.ndim == 1 and len(y_N) and torch.isfinite(y_N).all() and tags is None


@pytest.mark.parametrize(
    "options", [{"speed": [0, 1]}, {"gain_db": [3, -3]}, {"volume": 3}, {"probability": 0}, {"lowpass": [1, "inf"]}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        augment(**options)


def test_warp_moves_a_tone_and_keeps_its_time():
    rate = 16_000
    t = np.arange(rate) / rate
    x_N = (np.sin(2 * np.pi * 1000 * t) * (t < 0.5)).astype(np.float32)
    warped_N = warp(x_N, 1.25)
    assert len(warped_N) == len(x_N)
    spectrum = np.abs(np.fft.rfft(warped_N[1000:7000] * np.hanning(6000)))
    assert abs(spectrum.argmax() * rate / 6000 - 1250) < 35
    assert np.abs(warped_N[8600:]).max() < 0.02


def test_a_warp_by_one_changes_nothing():
    x_N = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    np.testing.assert_allclose(warp(x_N, 1.0), x_N, atol=1e-4)


def test_equalise_follows_its_curve():
    n = 8192
    x_N = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    gains_db = np.array([12.0, 12.0, 12.0, -12.0, -12.0, -12.0, -12.0, -12.0, -12.0])
    before, after = np.abs(np.fft.rfft(x_N)), np.abs(np.fft.rfft(equalise(x_N, gains_db)))
    low, high = slice(50, 400), slice(2000, 4000)  # below (2/8)^1.5 and above (3/8)^1.5 of half the rate
    np.testing.assert_allclose(20 * np.log10(after[low] / before[low]), 12, atol=0.05)
    np.testing.assert_allclose(20 * np.log10(after[high] / before[high]), -12, atol=0.05)
    np.testing.assert_allclose(equalise(x_N, np.zeros(9)), x_N, atol=1e-5)
