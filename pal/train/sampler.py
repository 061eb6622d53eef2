"""Stateless batch sampler: the batch of a step is a pure function of seed, stage and step.

So a run can resume at any step, and the number of threads and processes does not change the batches.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock

import numpy as np

from pal.data.record_index import RowGroups
from pal.errors import ConfigError
from pal.train.recipe import BatchSize

ROUND = 1 << 16
"""Number of groups shuffled and batched together, to limit memory for millions of groups."""


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share their clips."""

    source: int
    rows: tuple[int, ...]
    """Indices into the source's records."""
    seed: int
    """Seed of its augmentation."""


@dataclass(frozen=True)
class Pool:
    """Sampling pool of one source."""

    groups: Sequence[Sequence[int]]
    """Records about each clip, or single records if rows are drawn individually; `RowGroups` for large sources."""
    weight: float | None = None
    repeat: float = 1.0
    seconds: Callable[[int], float] | None = None
    """Length of a group's audio, NaN if unknown; needed for batches measured in seconds or sorted by length."""


class Sampler:
    """Batches of one stage.

    An epoch draws a fixed number of groups from each source, shuffles them and cuts the sequence into batches; large
    epochs do so in rounds. A source visits all its groups before it repeats one, also across rounds and epochs.

    With `bucket`, that many consecutive batches form a bucket: their groups are sorted by length and cut into batches
    again, which are shuffled. So a batch has clips of similar length, and the mixture of sources does not change.
    """

    def __init__(self, pools: Sequence[Pool], batch: BatchSize, seed: int, stage: int) -> None:
        self.pools = pools
        self.batch = batch
        self.key = (seed, stage)
        self.counts = _draws_per_epoch(pools)
        self.rounds = -(-sum(self.counts) // ROUND)
        """Number of rounds of an epoch."""
        self._round = lru_cache(maxsize=2)(self._plan)
        self._turn = lru_cache(maxsize=2 * len(pools))(self._order)
        self._starts = [0]
        """First step of each round so far."""
        self._limit = _fixed_limit(pools, batch)
        self._lock = Lock()

    def __getitem__(self, step: int) -> list[Group]:
        """Batch of a step, for all processes together."""
        with self._lock:
            number = 0
            while step >= self._start(number + 1):
                number += 1
            return self._round(number)[step - self._starts[number]]

    def steps(self, epochs: float) -> int:
        """Number of steps of `epochs` epochs, at least 1."""
        rounds = epochs * self.rounds
        whole = int(rounds)
        steps = self._start(whole)
        if rounds > whole:
            steps += round((rounds - whole) * self._size(whole))
        return max(1, steps)

    def _start(self, number: int) -> int:
        while len(self._starts) <= number:
            self._starts.append(self._starts[-1] + self._size(len(self._starts) - 1))
        return self._starts[number]

    def _size(self, number: int) -> int:
        """Number of batches of a round; without planning it if every batch but the last is full."""
        if self._limit is None:
            return len(self._round(number))
        return -(-sum(last - first for first, last in self._drawn(number)) // self._limit)

    def _drawn(self, number: int) -> list[tuple[int, int]]:
        """Positions that a round draws of each source: the first, and the end."""
        return [(number * count // self.rounds, (number + 1) * count // self.rounds) for count in self.counts]

    def _plan(self, number: int) -> list[list[Group]]:
        drawn = []
        for source, (first, last) in enumerate(self._drawn(number)):
            for position in range(first, last):
                turn, index = self._group_at(source, position)
                drawn.append((source, index, turn))
        groups, lengths = [], []
        for place, i in enumerate(permutation(len(drawn), *self.key, "order", number)):
            source, index, turn = drawn[i]
            groups.append(Group(source, self._rows(source, index, turn), _hash(*self.key, number, place)))
            lengths.append(self._seconds(source, index))
        lengths = _without_unknown(lengths)
        batches = self._cut(groups, lengths, range(len(groups)))
        if self.batch.bucket is not None:
            batches = self._bucketed(groups, lengths, batches, number)
        return [[groups[at] for at in batch] for batch in batches]

    def _cut(self, groups: Sequence[Group], lengths: Sequence[float], order: Sequence[int]) -> list[list[int]]:
        """Batches within the limits: indices of `groups`, taken in the given order."""
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
        """Batches of the same groups, by similar length."""
        bucket = self.batch.bucket
        assert bucket is not None
        # at least two buckets, of equal size: with a single one, every epoch would have the same batches
        stretches = max(2, -(-len(batches) // bucket))
        edges = [i * len(batches) // stretches for i in range(stretches + 1)]
        out = []
        for first, last in pairwise(edges):
            together = [at for batch in batches[first:last] for at in batch]
            # the sort is stable: groups of equal length stay in random order
            cut = self._cut(groups, lengths, sorted(together, key=lengths.__getitem__))
            out += [cut[i] for i in permutation(len(cut), *self.key, "bucket", number, first)]
        return out

    def _group_at(self, source: int, position: int) -> tuple[int, int]:
        """(pass, group) at a position of the source's endless sequence of permutations."""
        size = len(self.pools[source].groups)
        turn, place = divmod(position, size)
        return turn, int(self._turn(source, turn)[place])

    def _order(self, source: int, turn: int) -> np.ndarray:
        return permutation(len(self.pools[source].groups), *self.key, "source", source, turn)

    def _rows(self, source: int, index: int, turn: int) -> tuple[int, ...]:
        """Rows about a clip at its `turn`-th visit: all, or the next few of a shuffled pass over them."""
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
    """Contents of a batch, measured against its limits."""

    def __init__(self, size: BatchSize) -> None:
        self.size = size
        self.clips = 0
        self.rows = 0
        self.seconds = 0.0

    def fits(self, group: Group, seconds: float) -> bool:
        """True if the group fits; a group above the limits gets a batch of its own."""
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


def _without_unknown(lengths: list[float]) -> list[float]:
    """Lengths with the mean of the known ones for those that are NaN; so unusable clips do not meet in one batch."""
    known = [length for length in lengths if not math.isnan(length)]
    if len(known) == len(lengths):
        return lengths
    mean = sum(known) / max(1, len(known))
    return [mean if math.isnan(length) else length for length in lengths]


def _fixed_limit(pools: Sequence[Pool], batch: BatchSize) -> int | None:
    """Number of groups in every full batch; None if it depends on the groups."""
    if batch.by_length:
        return None
    if batch.rows is None:
        return batch.clips
    if all(isinstance(pool.groups, RowGroups) and pool.groups.single for pool in pools):
        return batch.rows if batch.clips is None else min(batch.rows, batch.clips)
    return None


def share(groups: list[Group], part: int, parts: int) -> tuple[list[Group], bool]:
    """Groups of one process or accumulation step.

    Returns:
        The groups, and True if they count. With fewer groups than parts, an empty part repeats the first group with
        its loss multiplied by 0, so that every process runs the same passes.
    """
    mine = groups[part::parts]
    return (mine, True) if mine else (groups[:1], False)


def _draws_per_epoch(pools: Sequence[Pool]) -> list[int]:
    """Number of groups of an epoch from each source: by weight, or the source's size times `repeat`."""
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
    """Permutation of the numbers below `size`, determined by the key: [size]."""
    if size < 32:
        # setting up one of numpy's generators takes longer than shuffling a short list
        short = list(range(size))
        random.Random(_hash(*key)).shuffle(short)
        return np.array(short, dtype=np.int64)
    order: np.ndarray = np.random.Generator(np.random.PCG64(_hash(*key))).permutation(size)
    # half the memory for millions of groups
    return order.astype(np.uint32) if ROUND < size < 1 << 32 else order
