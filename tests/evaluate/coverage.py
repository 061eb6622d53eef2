"""How often 95 % intervals hold the truth: many data sets from known populations, scored as an evaluation would.

    python -m tests.evaluate.coverage [--sets 400] [WORD ...]

Two truths are counted: the metric of the whole population, and the mean metric of data sets of this size, from which
the population's differs where labels are rare (of few clips, average precision is too good). Words choose cases.
docs/evaluation.md has the table; `test_coverage.py` runs a few cases with fewer data sets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pal.evaluate.bootstrap import Groups, draw
from pal.evaluate.label_metrics import MacroF1, MeanAveragePrecision
from pal.evaluate.metrics import Metric, Ratio

LABELS = 20
Draw = Callable[[np.random.Generator, int, int], Metric]
"""(generator, clips, questions a clip) -> the metric of a data set; a clip's questions are neighbours."""


@dataclass(frozen=True)
class Case:
    """A population, and how much of it a data set has."""

    name: str
    of: Draw
    clips: int
    questions: int = 1


@dataclass(frozen=True)
class Covered:
    """What came of many data sets."""

    population: float
    """The metric of 100,000 clips."""
    mean: float
    """Of the data sets' metrics."""
    holds_population: float
    """Share of the intervals."""
    holds_mean: float
    holds_own: float
    """The data set's own metric; anything below 1 is a fault."""
    width: float


def measured(case: Case, sets: int, seed: int = 0) -> Covered:
    """Draw data sets, give each an interval, and count."""
    rng = np.random.default_rng([seed, case.clips, case.questions])
    population = case.of(rng, 100_000, 1).value()
    groups = Groups(np.repeat(np.arange(case.clips), case.questions).tolist())
    drawn = [draw([case.of(rng, case.clips, case.questions)], groups, seed=at)[0] for at in range(sets)]
    value_S = np.asarray([one.value for one in drawn])
    low_S, high_S = np.asarray([one.interval() for one in drawn]).T

    def holds(truth: float | NDArray[np.float64]) -> float:
        return float(np.mean((low_S <= truth) & (truth <= high_S)))

    mean = float(value_S.mean())
    # a mean of many equal numbers may miss them by a rounding
    mean = float(value_S[0]) if np.ptp(value_S) == 0 else mean
    return Covered(population, mean, holds(population), holds(mean), holds(value_S), float(np.mean(high_S - low_S)))


def accuracy(right: float) -> Draw:
    """Questions that are right with this chance, half of a clip's together with its first one."""

    def of(rng: np.random.Generator, clips: int, questions: int) -> Metric:
        own_CQ = rng.random((clips, questions)) < right
        follows_CQ = rng.random((clips, questions)) < 0.5
        return Ratio.right(np.where(follows_CQ, own_CQ[:, :1], own_CQ).ravel().tolist())

    return of


def macro_f1(right: float, share: NDArray[np.float64]) -> Draw:
    """One label of `share` a clip, said with this chance and else any; a clip's questions have one label."""

    def of(rng: np.random.Generator, clips: int, questions: int) -> Metric:
        held_N = np.repeat(rng.choice(len(share), clips, p=share), questions)
        said_N = np.where(
            rng.random(len(held_N)) < right, held_N, np.repeat(rng.integers(0, len(share), clips), questions)
        )
        eye = np.eye(len(share), dtype=bool)
        return MacroF1(eye[held_N], eye[said_N])

    return of


def mean_ap(apart: float, share: NDArray[np.float64]) -> Draw:
    """Labels that a clip has by their `share`; scores of normal spread, those of labels that are there `apart` higher.

    Half of the spread is the clip's own, whatever the question.
    """

    def of(rng: np.random.Generator, clips: int, questions: int) -> Metric:
        truth_CL = rng.random((clips, len(share))) < share
        clip_CL = rng.standard_normal((clips, len(share)))
        truth_NL, clip_NL = np.repeat(truth_CL, questions, 0), np.repeat(clip_CL, questions, 0)
        spread_NL = (clip_NL + rng.standard_normal(clip_NL.shape)) / 2**0.5
        return MeanAveragePrecision(truth_NL, spread_NL + apart * truth_NL)

    return of


RARE = 1 / np.arange(1, LABELS + 1)
"""Zipf's: of twenty labels the last is twenty times as rare as the first."""
EVEN = np.full(5, 0.2)
ONE_OF = RARE / RARE.sum()
SOME_OF = np.clip(2 * ONE_OF, 0.02, 0.6)

CASES = [
    *(
        Case(f"accuracy {p:g}", accuracy(p), n, q)
        for p in (0.6, 0.9, 0.99, 1.0)
        for n, q in ((20, 1), (200, 1), (50, 5))
    ),
    *(
        Case(f"macro F1, 20 labels, right {p:g}", macro_f1(p, ONE_OF), n, q)
        for p in (0.5, 0.8, 0.97, 1.0)
        for n, q in ((50, 1), (200, 1), (100, 3))
    ),
    *(
        Case(f"mAP, {len(share)} labels, {apart:g} apart", mean_ap(apart, share), n, q)
        for share in (SOME_OF, EVEN)
        for apart in (1.0, 2.5, 5.0, 50.0)
        for n, q in ((50, 1), (200, 1), (100, 3))
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.evaluate.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of them")
    parser.add_argument("--sets", type=int, default=400, help="data sets of each case")
    asked = parser.parse_args()
    print(
        "| metric | clips | questions per clip | population | mean | contains population's | contains mean | own | width |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if asked.words and not any(word in case.name for word in asked.words):
            continue
        c = measured(case, asked.sets)
        print(
            f"| {case.name} | {case.clips} | {case.questions} | {c.population:.3f} | {c.mean:.3f} "
            f"| {c.holds_population:.3f} | {c.holds_mean:.3f} | {c.holds_own:.3f} | {c.width:.3f} |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
