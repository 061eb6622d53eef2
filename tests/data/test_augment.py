"""Augmentation: the same generator gives the same clip, and tags stay where their sounds are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.config import parse
from pal.data.augment import Augment, audible_tags, equalise, loudness, lowpass, noise, warp
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
    x_N, tags = burst(0.5, 1.2), [TagSpan("tone", 0.5, 1.2), TagSpan("all", 0.0, 2.0)]
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
        {"time_shift": 0.45, "wrap": True},
        {"speed": [0.8, 1.2], "pad_seconds": 3.0, "time_shift": 0.2, "wrap": True},
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
def test_shift_moves_tags(seed):
    y_N, after = augment(time_shift=0.45)(burst(0.6, 1.3), RATE, np.random.default_rng(seed), [TagSpan("t", 0.6, 1.3)])
    assert len(y_N) == 2 * RATE
    assert (after[0].start, after[0].end) == pytest.approx(sounding(y_N), abs=2e-3)


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
        assert sum(tag.end - tag.start for tag in after) == pytest.approx(1.0, abs=1e-6)
        for tag in after:
            inside_N = y_N[round(tag.start * RATE) : round(tag.end * RATE)]
            if tag.end - tag.start < 0.02:  # some periods at least
                continue
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


def test_lowpass_keeps_below_and_lowers_above():
    low_N, high_N = burst(0, 2, hz=1000).numpy(), burst(0, 2, hz=5000).numpy()
    y_N = lowpass(low_N + high_N, RATE, 2500.0)
    # away from the ends, where the transform wraps around
    np.testing.assert_allclose(y_N[4000:-4000], (low_N + 10 ** (-10 / 20) * high_N)[4000:-4000], atol=2e-3)


@pytest.mark.parametrize("samples", [1, 7, 100, 30_001])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_never_nan_and_never_empty(samples, level):
    x_N = torch.full((samples,), level)
    for seed in range(6):
        y_N, tags = augment(**EVERYTHING)(x_N, RATE, np.random.default_rng(seed), [])
        assert y_N.dtype == torch.float32 and y_N.ndim == 1 and len(y_N) and torch.isfinite(y_N).all() and tags == []


@pytest.mark.parametrize(
    "options",
    [
        {"speed": [0, 1]},
        {"speed": [1, 3]},
        {"gain_db": [3, -3]},
        {"volume": 3},
        {"probability": 0},
        {"lowpass": [1, "inf"]},
        {"eq_db": 30},
        {"noise_db": [-20, 0]},
    ],
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


@pytest.mark.parametrize("factor", [0.85, 0.94, 1.06, 1.16, 1.4])
def test_a_warped_tone_keeps_its_level(factor):
    t = np.arange(RATE) / RATE
    for hz in (200, 440, 1000, 1313, 2500, 3500, 4700):
        x_N = (0.1 * np.sin(2 * np.pi * hz * t)).astype(np.float32)
        y_N = warp(x_N, factor)
        assert tone_db(y_N[2000:-2000], hz * factor) == pytest.approx(tone_db(x_N[2000:-2000], hz), abs=3), hz
    noise_N = noise(np.random.default_rng(0), RATE, 0.1)
    assert 20 * np.log10(loudness(warp(noise_N, factor), RATE) / loudness(noise_N, RATE)) > -6


def test_a_warped_click_stays_where_it_is():
    x_N = np.zeros(RATE, np.float32)
    x_N[8000] = 1
    for factor in (0.85, 1.16):
        power_N = np.square(warp(x_N, factor))
        assert (power_N * np.arange(RATE)).sum() / power_N.sum() == pytest.approx(8000, abs=80)  # 5 ms
        assert power_N[8000 - 260 : 8000 + 260].sum() > 0.99 * power_N.sum()


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


# What a label is about stays: the bounds that the module states


def tone_db(samples_N, hz: float) -> float:
    """Level of a tone by its energy within a twelfth of an octave, in decibels."""
    spectrum = np.fft.rfft(np.asarray(samples_N, dtype=float))
    at = np.fft.rfftfreq(len(samples_N), 1 / RATE)
    inside = (at > hz * 2 ** (-1 / 24)) & (at < hz * 2 ** (1 / 24))
    return 10 * np.log10(max(float((np.abs(spectrum[inside]) ** 2).sum()) / len(samples_N), 1e-20))


UNTIMED = [None, [TagSpan("dog")], [TagSpan("bell", 0.1, 0.2), TagSpan("dog")], [TagSpan("dog", 0.3)]]


@pytest.mark.parametrize("tags", UNTIMED, ids=["unknown", "alone", "beside another", "without its end"])
@pytest.mark.parametrize("options", [{"crop_seconds": 0.5}, {"time_shift": 1.0}], ids=str)
def test_what_cuts_is_refused_where_a_label_has_no_time(options, tags):
    what = "the label 'dog'" if tags else "the clip's label"
    with pytest.raises(ConfigError, match=f"'{next(iter(options))}' may cut out what {what} is about") as caught:
        augment(**options, probability=1e-9)(burst(0, 2), RATE, np.random.default_rng(0), tags)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_what_moves_around_is_not_refused():
    for tags in UNTIMED:
        y_N, after = augment(time_shift=1.0, wrap=True)(burst(0, 1), RATE, np.random.default_rng(0), tags)
        assert torch.equal(y_N.sort().values, burst(0, 1).sort().values)
        assert after is None or {tag.label for tag in after} == {tag.label for tag in tags}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1.9), st.floats(0.01, 1.0), st.floats(0, 20)), min_size=1, max_size=3),
    st.sampled_from([{"crop_seconds": 0.7}, {"time_shift": 1.5}, {"time_shift": 1.5, "wrap": True}]),
    st.integers(0, 1000),
)
def test_a_tag_is_dropped_exactly_where_its_sound_is_gone(events, options, seed):
    """Events are noise, of which no two samples are alike: so it can be seen which ones are left."""
    t = np.arange(2 * RATE) / RATE
    rng = np.random.default_rng(0)
    tags, parts = [], []
    for number, (start, length, decay) in enumerate(events):
        end = min(2.0, start + length)
        tags.append(TagSpan(str(number), start, end))
        fades = np.exp(-decay * np.clip(t - start, 0, None)) * ((t >= start) & (t < end))
        parts.append((0.3 * fades * rng.uniform(-1, 1, len(t))).astype(np.float32))
    x_N = np.sum(parts, axis=0)
    y_N, after = augment(**options)(torch.from_numpy(x_N), RATE, np.random.default_rng(seed), tags)
    left_N = np.isin(x_N, y_N.numpy())
    for tag, part_N in zip(tags, parts, strict=True):
        spans = [one for one in after if one.label == tag.label]
        if spans:
            inside_N = np.concatenate([y_N[round(s.start * RATE) : round(s.end * RATE)].numpy() for s in spans])
            assert loudness(inside_N, RATE) >= 0.3 * loudness(part_N, RATE)
        else:
            # the rule is a share of 0.01 of what sounds during the tag, here of the event alone
            assert np.square(part_N[left_N]).sum() <= 1.5e-2 * np.square(part_N).sum()


def test_no_tag_is_left_too_short_or_too_faint():
    # loud for 0.2 s, then 25 dB lower: a cut within the tail alone would leave a label of what is hardly there
    x_N = torch.cat([burst(0, 0.2, 0.2), burst(0, 1.8, 1.8) * 10 ** (-25 / 20)])
    tag, kept, gone = TagSpan("bark", 0.0, 2.0), 0, 0
    assert audible_tags(x_N.numpy(), RATE, [tag], 0, RATE) == [tag]
    assert audible_tags(x_N.numpy(), RATE, [tag], RATE, 2 * RATE) is None
    for seed in range(30):
        y_N, after = augment(crop_seconds=0.5)(x_N, RATE, np.random.default_rng(seed), [tag])
        kept += bool(after)
        gone += not after
        assert loudness(y_N.numpy(), RATE) > loudness(x_N.numpy(), RATE) * 10 ** (-10 / 20)
    assert (kept, gone) == (30, 0)
    short = TagSpan("click", 1.0, 1.2)
    for last, audible in ((0.99, []), (1.02, None), (1.06, [short])):
        assert audible_tags(burst(1.0, 1.2).numpy(), RATE, [short], 0, round(last * RATE)) == audible


def test_a_clip_without_a_place_to_cut_stays_whole(monkeypatch):
    monkeypatch.setattr("pal.data.augment.TRIES", 3)
    # tags of 60 ms everywhere: any cut leaves one of less than 50
    tags = [TagSpan(str(i), 0.01 * i, 0.01 * i + 0.06) for i in range(195)]
    for options in ({"crop_seconds": 0.5}, {"time_shift": 0.5}):
        y_N, after = augment(**options)(burst(0, 2), RATE, np.random.default_rng(0), tags)
        assert torch.equal(y_N, burst(0, 2)) and after == tags


@pytest.mark.parametrize("seed", range(10))
def test_a_short_tag_that_wraps_keeps_both_pieces(seed):
    tag = TagSpan("click", 0.0, 0.06)  # moved to the left, most of it comes in at the right
    _, after = augment(time_shift=0.05, wrap=True)(burst(0, 0.06), RATE, np.random.default_rng(seed), [tag])
    assert sum(one.end - one.start for one in after) == pytest.approx(0.06)


def test_moments_move_and_are_never_dropped():
    for options in ({"speed": [1.2, 1.3]}, {"pad_seconds": 3.0}, {"time_shift": 0.4, "wrap": True}):
        _, after = augment(**options)(burst(0, 2), RATE, np.random.default_rng(1), [TagSpan("now", 1.0, 1.0)])
        assert len(after) == 1 and after[0].start == after[0].end != 1.0
    _, after = augment(crop_seconds=0.5)(burst(0, 2), RATE, np.random.default_rng(1), [TagSpan("now", 1.0, 1.0)])
    assert len(after) in (0, 1)


FILTERS = [
    {"lowpass": [200, 7000]},
    {"eq_db": 12},
    {"lowpass": [200, 300], "eq_db": 12},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@settings(max_examples=15, deadline=None)
@given(hz=st.floats(100, 7800), seed=st.integers(0, 1000), quieter=st.floats(0, 40))
def test_filters_leave_every_sound(options, hz, seed, quieter):
    """However much louder another sound is: an untimed flute under an engine."""
    x_N = burst(0, 2, hz=hz) * 10 ** (-quieter / 20) + burst(0, 2, hz=60)
    y_N, _ = augment(**options)(x_N, RATE, np.random.default_rng(seed), [TagSpan("flute")])
    bound = 12 * ("eq_db" in options) + 10 * ("lowpass" in options)
    assert tone_db(y_N, hz) >= tone_db(x_N, hz) - bound - 1


@pytest.mark.parametrize("options", [{"speed": [1.9, 2.0]}, {"speed": [1.1, 1.2]}, {"warp": 0.49}], ids=str)
@pytest.mark.parametrize("hz", [1000.0, 3500.0, 5000.0, 6500.0, 7200.0])
def test_no_pitch_moves_out_of_the_band(options, hz):
    """A high sound by itself, for some time, beside a loud low one."""
    x_N = 0.1 * burst(1.2, 1.8, hz=hz) + burst(0, 1, hz=100)
    for seed in range(4):
        y_N, _ = augment(**options)(x_N, RATE, np.random.default_rng(seed), [TagSpan("alarm")])
        scale = len(x_N) / len(y_N)
        part_N = y_N[round(1.25 * RATE / scale) : round(1.75 * RATE / scale)].numpy()
        assert 20 * np.log10(loudness(part_N, RATE) / (0.03 / 2**0.5)) >= -10


@settings(max_examples=30, deadline=None)
@given(st.floats(-120, 0), st.floats(-100, 60), st.integers(0, 100))
def test_gain_leaves_a_clip_above_a_level(level, gain, seed):
    x_N = burst(0.5, 1.5) * 10 ** (level / 20)
    y_N, _ = augment(gain_db=[gain, gain])(x_N, RATE, np.random.default_rng(seed), [TagSpan("dog")])
    before, after = (20 * np.log10(loudness(z_N.numpy(), RATE)) for z_N in (x_N, y_N))
    assert after >= min(before, -70) - 0.01
    assert y_N.abs().max() <= 1.0 + 1e-6


def test_noise_covers_no_tag():
    # a quiet tone beside a loud one: the ratio is that to the quiet one
    x_N = burst(0, 1) + 0.05 * burst(1.0, 2.0, hz=2000)
    tags = [TagSpan("loud", 0.0, 1.0), TagSpan("quiet", 1.0, 2.0)]
    y_N, _ = augment(noise_db=[3, 3])(x_N, RATE, np.random.default_rng(0), tags)
    added = (y_N - x_N).square().mean().sqrt().item()
    assert 20 * np.log10(0.05 * 0.3 / 2**0.5 / added) == pytest.approx(3, abs=0.3)
    # without times it is the clip's loud parts, and at least 10 dB
    for untimed in ([TagSpan("somewhere")], None):
        y_N, _ = augment(noise_db=[3, 3])(x_N, RATE, np.random.default_rng(0), untimed)
        added = (y_N - x_N).square().mean().sqrt().item()
        assert 20 * np.log10(loudness(x_N.numpy(), RATE) / added) == pytest.approx(10, abs=0.3)
