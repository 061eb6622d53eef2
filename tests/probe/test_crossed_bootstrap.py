"""The bootstrap over clips and seeds against every data set that it can draw, written out."""

from itertools import product

import numpy as np
import pytest

from pal.probe.crossed_bootstrap import CrossedBootstrap


def every_draw(right_KI, clips, seeds, items_of):
    """The scores of all equally likely data sets: each clip and each seed in each place."""
    K, G = len(seeds), len(clips)
    found = []
    for some_clips in product(clips, repeat=G):
        items = [item for clip in some_clips for item in items_of[clip]]
        for some_seeds in product(seeds, repeat=K):
            found.append(np.mean([[right_KI[seed][item] for item in items] for seed in some_seeds]))
    return np.array(found)


def test_draws_are_those_of_every_clip_and_seed():
    # three clips of one, two and three questions; two seeds
    groups = ["a", "b", "b", "c", "c", "c"]
    right_KI = np.array([[1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0]], float)
    items_of = {"a": [0], "b": [1, 2], "c": [3, 4, 5]}
    draws = CrossedBootstrap(right_KI[None], np.zeros((1, 2, 6)), groups)
    exact = every_draw(right_KI, "abc", [0, 1], items_of)
    drawn_R = draws.score_RX[:, 0]
    assert draws.score(0)[0] == pytest.approx(6 / 12)
    assert set(np.round(drawn_R, 9)) <= set(np.round(exact, 9))
    assert drawn_R.mean() == pytest.approx(exact.mean(), abs=4 * exact.std() / 2000**0.5)
    assert drawn_R.std() == pytest.approx(exact.std(), rel=0.05)
    low, high = draws.score(0)[1]
    # between two possible values where those have their jump near the quantile
    assert np.mean(exact < low - 1e-9) <= 0.035 and np.mean(exact > high + 1e-9) <= 0.035


def test_seeds_alone_and_clips_alone():
    one_clip = CrossedBootstrap(np.array([[[1.0, 1.0], [0.0, 0.0]]]), np.zeros((1, 2, 2)), ["a", "a"])
    # both seeds the right one, or both the wrong one, in a quarter of the draws each
    assert one_clip.score(0) == (0.5, (0.0, 1.0))
    assert np.mean(one_clip.score_RX == 0.5) == pytest.approx(0.5, abs=0.05)
    one_seed = CrossedBootstrap(np.array([[[1.0, 0.0]]]), np.zeros((1, 1, 2)), ["a", "b"])
    assert one_seed.score(0) == (0.5, (0.0, 1.0))
    assert np.mean(one_seed.score_RX == 1) == pytest.approx(0.25, abs=0.05)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    right_KI = (rng.random((3, 40)) < 0.5).astype(float)
    # the second cell is right where the first is, and always on one clip's questions, which the first never is
    right_KI[:, :2] = 0
    better_KI = right_KI.copy()
    better_KI[:, :2] = 1
    groups = [str(i // 2) for i in range(40)]
    draws = CrossedBootstrap(np.stack([right_KI, better_KI, right_KI]), np.zeros((3, 3, 40)), groups)
    by, (low, high) = draws.difference(1, 0)
    assert by == pytest.approx(2 / 40)
    # the clip is drawn n times of 20 with chance binomial(20, 1/20): 0 to 3 times in all but 1.6 %
    assert (low, high) == pytest.approx((0.0, 3 / 20))
    assert draws.difference(2, 0) == (0.0, (0.0, 0.0))
    low, high = draws.score(0)[1]
    assert high - low > 0.1


def test_what_is_kept():
    full_KI = np.ones((2, 8))
    half_KI = np.array([[1, 0] * 4, [0, 1] * 4], float)
    no_audio_XKI = np.stack([np.zeros((2, 8)), np.full((2, 8), 0.2)])
    no_audio_XKI[0] = 0.1
    groups = [str(i // 2) for i in range(8)]
    draws = CrossedBootstrap(np.stack([half_KI, full_KI]), no_audio_XKI, groups)
    assert draws.kept(0, 1) == (0.5, (0.5, 0.5))
    value, ends = draws.gain_kept(0, 1)
    assert (value, *ends) == pytest.approx((0.4 / 0.8,) * 3)
    assert draws.gain(0) == (pytest.approx(0.4), (pytest.approx(0.4), pytest.approx(0.4)))
    nothing = CrossedBootstrap(np.stack([half_KI, full_KI]), np.ones((2, 2, 8)), groups)
    assert nothing.gain_kept(0, 1) is None
    never = CrossedBootstrap(np.stack([half_KI, np.zeros((2, 8))]), np.zeros((2, 2, 8)), groups)
    assert never.kept(0, 1) is None and never.gain_kept(0, 1) is None
    # right on one of four clips: a draw without that clip has no ratio, all others have this one
    rare_KI = np.array([[1.0, 0, 0, 0]])
    rare = CrossedBootstrap(np.stack([rare_KI, rare_KI]), np.zeros((2, 1, 4)), list("abcd"))
    assert rare.kept(0, 1) == (1.0, (1.0, 1.0))


def test_whatever_is_estimated_lies_in_its_interval():
    rng = np.random.default_rng(0)
    for seed in range(30):
        cells, seeds, questions = 2, int(rng.integers(1, 4)), int(rng.integers(1, 6))
        shape = (cells, seeds, questions)
        right, no_audio = (np.round(rng.random(shape) + at).clip(0, 1) * rng.choice([0.1, 1.0]) for at in (0.3, -0.3))
        draws = CrossedBootstrap(right, no_audio, [str(i // 2) for i in range(questions)], seed)
        found = [draws.score(0), draws.gain(1), draws.difference(1, 0), draws.kept(1, 0), draws.gain_kept(1, 0)]
        for value, (low, high) in filter(None, found):
            assert low <= value <= high
