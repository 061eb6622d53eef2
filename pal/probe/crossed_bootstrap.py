"""Bootstrap of scores over two crossed factors: questions (by clip) and training seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pal.evaluate.bootstrap import Groups, interval, resample
from pal.evaluate.metrics import Ratio

Numbers = NDArray[np.float64]
Estimate = tuple[float, tuple[float, float]]
"""A number and its 95 % interval."""

INTERVALS = (
    "95 % intervals by a bootstrap over clips and seeds: 2000 samples draw all clips, with their questions, and all "
    "seeds with replacement. All cells are scored on the same samples, so differences are paired. The ends are the "
    "2.5th and the 97.5th percentile. Few seeds say little about other seeds: with three, the ends are about those of "
    "the worst and the best seed. There is no correction for multiple comparisons: of twenty differences that are 0, "
    "one is expected to be significant."
)
"""Description of the intervals, shown beside them. Bootstrap of crossed factors: Owen 2007, "The pigeonhole
bootstrap"."""


class CrossedBootstrap:
    """Scores of cells over seeds and questions, with bootstrap draws of clips and seeds.

    Args:
        right_XKI: 1 if cell x with seed k answered question i right, else 0.
        no_audio_XKI: the same without audio.
        groups: clip of each question; questions about one clip are drawn together.
        seed: seed of the bootstrap.
    """

    def __init__(self, right_XKI: Numbers, no_audio_XKI: Numbers, groups: Sequence[str], seed: int = 0) -> None:
        X, K, _ = right_XKI.shape
        both = np.concatenate([right_XKI, no_audio_XKI])
        self.by_seed_XK = right_XKI.mean(2)
        self.score_X, self.no_audio_X = right_XKI.mean((1, 2)), no_audio_XKI.mean((1, 2))
        metrics = [Ratio.mean(values) for row in both for values in row]
        clips_RXK = resample(metrics, Groups(groups), seed).reshape(-1, 2 * X, K)
        rng = np.random.default_rng((seed, K))
        shares_RK = rng.multinomial(K, np.full(K, 1 / K), size=len(clips_RXK)) / K
        drawn_RX = np.einsum("rxk,rk->rx", clips_RXK, shares_RK)
        self.score_RX, self.no_audio_RX = drawn_RX[:, :X], drawn_RX[:, X:]

    def score(self, cell: int) -> Estimate:
        """Mean score of a cell over the seeds."""
        score = float(self.score_X[cell])
        return score, interval(self.score_RX[:, cell], score)

    def gain(self, cell: int) -> Estimate:
        """Gain from audio: the score minus that of the same models without audio."""
        gain = float(self.score_X[cell] - self.no_audio_X[cell])
        return gain, interval(self.score_RX[:, cell] - self.no_audio_RX[:, cell], gain)

    def difference(self, cell: int, other: int) -> Estimate:
        """Paired difference of the scores of two cells."""
        apart = float(self.score_X[cell] - self.score_X[other])
        return apart, interval(self.score_RX[:, cell] - self.score_RX[:, other], apart)

    def kept(self, cell: int, other: int) -> Estimate | None:
        """Paired ratio of the scores of two cells; None if the other score is 0."""
        return _ratio(self.score_X, self.score_RX, cell, other)

    def gain_kept(self, cell: int, other: int) -> Estimate | None:
        """Paired ratio of the gains from audio of two cells; None if the other gain is not significant."""
        if self.gain(other)[1][0] <= 0:
            return None
        return _ratio(self.score_X - self.no_audio_X, self.score_RX - self.no_audio_RX, cell, other)


def _ratio(value_X: Numbers, drawn_RX: Numbers, over: int, under: int) -> Estimate | None:
    if value_X[under] <= 0:
        return None
    some_RX = drawn_RX[drawn_RX[:, under] > 0]  # a draw with denominator 0 has no ratio
    share = float(value_X[over] / value_X[under])
    return share, interval(some_RX[:, over] / some_RX[:, under], share)
