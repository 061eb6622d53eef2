"""Which records are in the batch of a step: a pure function of seed, stage and step.

Nothing is remembered between steps, so that a run can be taken up anywhere, and neither threads nor
processes can change what is drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock

import numpy as np

from pal.errors import ConfigError
from pal.train.recipe import BatchSize

ROUND = 1 << 16
"""Groups that are mixed and cut into batches at once, so that millions need little memory."""


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share their clips."""

    source: int
    rows: tuple[int, ...]
    """Indices into the source's records."""
    seed: int
    """For everything random about these rows: augmentation."""


@dataclass(frozen=True)
class Pool:
    """What can be drawn from one source."""

    groups: Sequence[Sequence[int]]
    """Records of each clip; one record each where rows are drawn on their own."""
    weight: float | None = None
    repeat: float = 1.0
    seconds: Callable[[int], float] | None = None
    """Length of a group's audio; needed for batches measured in seconds or sorted by length."""


class Sampler:
    """The batches of one stage.

    An epoch draws a fixed number of groups from each source, mixes them and cuts the row of groups
    into batches; large epochs are mixed and cut in rounds. Each source goes through all its groups
    before it repeats one, across rounds and epochs too.

    With `bucket`, up to so many batches at a time are taken apart again, their groups sorted by length and
    cut anew, and the new batches mixed: clips of like length meet, and which ones is still chance. What such
    a stretch holds of each source stays.
    """

    def __init__(self, pools: Sequence[Pool], batch: BatchSize, seed: int, stage: int) -> None:
        self.pools = pools
        self.batch = batch
        self.key = (seed, stage)
        self.counts = _draws_per_epoch(pools)
        self.rounds = -(-sum(self.counts) // ROUND)
        """Of an epoch."""
        self._round = lru_cache(maxsize=2)(self._plan)
        self._turn = lru_cache(maxsize=2 * len(pools))(self._order)
        self._starts = [0]
        """First step of each round that was planned."""
        self._lock = Lock()

    def __getitem__(self, step: int) -> list[Group]:
        """The batch of a step, for all processes together."""
        with self._lock:
            number = 0
            while step >= self._start(number + 1):
                number += 1
            return self._round(number)[step - self._starts[number]]

    def steps(self, epochs: float) -> int:
        """Steps that a number of epochs takes, at least 1."""
        rounds = epochs * self.rounds
        whole = int(rounds)
        steps = self._start(whole)
        if rounds > whole:
            steps += round((rounds - whole) * len(self._round(whole)))
        return max(1, steps)

    def _start(self, number: int) -> int:
        while len(self._starts) <= number:
            self._starts.append(self._starts[-1] + len(self._round(len(self._starts) - 1)))
        return self._starts[number]

    def _plan(self, number: int) -> list[list[Group]]:
        drawn = []
        for source, count in enumerate(self.counts):
            for position in range(number * count // self.rounds, (number + 1) * count // self.rounds):
                turn, index = self._group_at(source, position)
                drawn.append((source, index, turn))
        groups, lengths = [], []
        for place, i in enumerate(permutation(len(drawn), *self.key, "order", number)):
            source, index, turn = drawn[i]
            groups.append(Group(source, self._rows(source, index, turn), _hash(*self.key, number, place)))
            lengths.append(self._seconds(source, index))
        batches = self._cut(groups, lengths, range(len(groups)))
        if self.batch.bucket is not None:
            batches = self._bucketed(groups, lengths, batches, number)
        return [[groups[at] for at in batch] for batch in batches]

    def _cut(self, groups: Sequence[Group], lengths: Sequence[float], order: Sequence[int]) -> list[list[int]]:
        """Groups, in this order and by number, as batches within the limits."""
        batches: list[list[int]] = []
        filling = _Filling(self.batch)
        for at in order:
            if not batches or not filling.fits(groups[at], lengths[at]):
                batches.append([])
                filling = _Filling(self.batch)
            batches[-1].append(at)
            filling.add(groups[at], lengths[at])
        return batches

    def _bucketed(
        self, groups: Sequence[Group], lengths: Sequence[float], batches: list[list[int]], number: int
    ) -> list[list[int]]:
        """The same groups in batches of like length."""
        bucket = self.batch.bucket
        assert bucket is not None
        # Even stretches, and no fewer than two: sorted in one piece, an epoch would be cut like the one before it.
        stretches = max(2, -(-len(batches) // bucket))
        edges = [i * len(batches) // stretches for i in range(stretches + 1)]
        out = []
        for first, last in pairwise(edges):
            together = [at for batch in batches[first:last] for at in batch]
            # the sort is stable: what is of one length stays in the order that chance gave it
            cut = self._cut(groups, lengths, sorted(together, key=lengths.__getitem__))
            out += [cut[i] for i in permutation(len(cut), *self.key, "bucket", number, first)]
        return out

    def _group_at(self, source: int, position: int) -> tuple[int, int]:
        """(pass, group) at a position of the source's endless row of permutations."""
        size = len(self.pools[source].groups)
        turn, place = divmod(position, size)
        return turn, int(self._turn(source, turn)[place])

    def _order(self, source: int, turn: int) -> np.ndarray:
        return permutation(len(self.pools[source].groups), *self.key, "source", source, turn)

    def _rows(self, source: int, index: int, turn: int) -> tuple[int, ...]:
        """The rows of a clip for its `turn`-th visit: all, or the next few of a shuffled round."""
        rows = self.pools[source].groups[index]
        take = self.batch.rows_per_clip if self.batch.grouped else None
        if take is None or len(rows) <= take:
            return tuple(rows)
        chosen: dict[int, None] = {}
        for position in range(turn * take, (turn + 1) * take):
            lap, place = divmod(position, len(rows))
            chosen[rows[int(permutation(len(rows), *self.key, "rows", source, index, lap)[place])]] = None
        return tuple(chosen)

    def _seconds(self, source: int, index: int) -> float:
        if not self.batch.by_length:
            return 0.0
        seconds = self.pools[source].seconds
        assert seconds is not None, "batches by length need the lengths of clips"
        return seconds(index)


class _Filling:
    """How full a batch is."""

    def __init__(self, size: BatchSize) -> None:
        self.size = size
        self.clips = 0
        self.rows = 0
        self.seconds = 0.0

    def fits(self, group: Group, seconds: float) -> bool:
        """Whether the group may be added; one that is too large by itself has a batch of its own."""
        size = self.size
        return not self.clips or not (
            (size.rows is not None and self.rows + len(group.rows) > size.rows)
            or (size.clips is not None and self.clips + 1 > size.clips)
            or (size.seconds is not None and self.seconds + seconds > size.seconds)
        )

    def add(self, group: Group, seconds: float) -> None:
        self.clips += 1
        self.rows += len(group.rows)
        self.seconds += seconds


def share(groups: list[Group], part: int, parts: int) -> tuple[list[Group], bool]:
    """The groups that one of several processes (or accumulation steps) works on.

    Returns:
        The groups, and whether they count: where there are fewer groups than parts, a part without
        any repeats the first one and its loss is multiplied by 0, so that all processes stay in step.
    """
    mine = groups[part::parts]
    return (mine, True) if mine else (groups[:1], False)


def _draws_per_epoch(pools: Sequence[Pool]) -> list[int]:
    """Groups that an epoch takes from each source: by weights, or each source's size times `repeat`."""
    weights = [pool.weight for pool in pools]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) != len(weights):
        raise ConfigError("some data sources of a stage have a weight and others none; give all or none a weight")
    if not given:
        return [max(1, round(pool.repeat * len(pool.groups))) for pool in pools]
    total = sum(len(pool.groups) for pool in pools)
    return [max(1, round(total * weight / sum(given))) for weight in given]


def _hash(*key: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest())


def permutation(size: int, *key: object) -> np.ndarray:
    """The numbers below `size` in an order that the key decides: int64 [size]."""
    if size < 32:
        # numpy's generators take longer to set up than a short list to shuffle.
        order = list(range(size))
        random.Random(_hash(*key)).shuffle(order)
        return np.array(order, dtype=np.int64)
    return np.random.Generator(np.random.PCG64(_hash(*key))).permutation(size)
