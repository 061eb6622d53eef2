"""Segments of a variable-length attention call: which rows and keys belong to each; computed on the host.

Queries of a conversation that see the same audio keys in a layer are a run. Each run becomes a segment, whose keys are
all that it sees, in the order of the conversation: [before | audio | after]. Attention in a segment is causal, aligned
at the end: its last query sees all keys, the query before it all but the last (`segment_attention`). Where only a few
keys lie between two runs, as between PAL's summary tokens, the runs share a segment, and each of these keys gets a
dummy query, whose output is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BRIDGE = 16
"""Keys between two runs up to which dummy queries cost less than another segment, with a copy of all keys so far."""
COPIES = 3
"""Copies of a row among the keys up to which its gradient is gathered; beyond, it is scattered."""


@dataclass(frozen=True)
class Conversation:
    """Order and positions of one conversation's rows and audio keys."""

    positions_T: Ints
    """Position ids of its rows."""
    text_T: Bools
    """True for rows of text; False for audio rows and repeated rows."""
    repeats_T: Bools
    """True where a row repeats the last text row, behind clips; it and the original do not see each other."""
    keys: tuple[Ints, ...]
    """Positions of the audio keys of each stream, in sliding windows."""
    order_T: Ints
    """Place of each row; it sees the keys at or before its own place."""
    key_order: tuple[Ints, ...]
    """Place of the audio keys of each stream."""
    sources_T: Ints
    """Stream of each row; -1 for text."""
    shared: int = 0
    """Number of its first rows that it shares with an earlier conversation, and all audio keys with them: only the
    later rows are in the batch a second time."""
    base: int = -1
    """Number of that conversation, which shares nothing itself."""

    @property
    def own(self) -> int:
        """Number of rows that it does not share."""
        return len(self.positions_T) - self.shared


@dataclass(frozen=True)
class Segments:
    """One attention call. Rows are numbered through the batch; the numbers of audio keys follow."""

    cu_seqlens_q: Ints
    cu_seqlens_k: Ints
    keys_K: Ints | None
    """Number of the row or audio key that each key of the call is; None where the rows are the keys."""
    back: tuple[Ints, ...]
    """Index of each row's and audio key's first copy among the call's keys, of its second, and so on; K for none."""
    queries_Q: Ints | None
    """Row of each query of the call; None where the rows are the queries."""
    unused_Q: Bools | None
    """True for dummy queries."""
    outs_N: Ints | None
    """Index of each row among the queries."""

    @property
    def longest(self) -> tuple[int, int]:
        """Largest number of queries and of keys in a segment."""
        return int(np.diff(self.cu_seqlens_q).max()), int(np.diff(self.cu_seqlens_k).max())

    def queries_with_keys(self) -> Bools:
        """True for queries whose segment has keys."""
        return np.repeat(np.diff(self.cu_seqlens_k) > 0, np.diff(self.cu_seqlens_q))


def widened(segments: Segments, size: Callable[[int], int]) -> Segments:
    """The same attention, padded to `size(n)` segments, queries and keys in place of n.

    The last segment, a run of rows without audio keys, gets dummy queries and further copies of its last row as keys;
    empty segments follow.

    Args:
        segments: to pad; the output of the last one is not used.
        size: maps a number to the same or a larger one.
    """
    count = len(segments.cu_seqlens_q) - 1
    cu_seqlens_q, cu_seqlens_k = (
        np.concatenate((firsts, np.full(size(count) - count, firsts[-1])))
        for firsts in (segments.cu_seqlens_q, segments.cu_seqlens_k)
    )
    if segments.keys_K is None:
        return replace(segments, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    queries, keys = int(segments.cu_seqlens_q[-1]), int(segments.cu_seqlens_k[-1])
    last_q, last_k = int(segments.cu_seqlens_q[-2]), int(segments.cu_seqlens_k[-2])
    more_q = 0 if segments.queries_Q is None else size(queries) - queries
    more_k = size(keys + more_q) - keys  # at least as many as queries, so that each query sees a key
    cu_seqlens_q[count:] += more_q
    cu_seqlens_k[count:] += more_k
    found = replace(
        segments,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        keys_K=_inserted(segments.keys_K, last_k, more_k),
        back=tuple(np.where(places >= last_k, places + more_k, places) for places in segments.back),
    )
    if segments.queries_Q is None or segments.unused_Q is None or segments.outs_N is None:
        return found
    unused_Q = _inserted(segments.unused_Q, last_q, more_q)
    unused_Q[last_q : last_q + more_q] = True
    return replace(
        found,
        queries_Q=_inserted(segments.queries_Q, last_q, more_q),
        unused_Q=unused_Q,
        outs_N=np.where(segments.outs_N >= last_q, segments.outs_N + more_q, segments.outs_N),
    )


def _inserted(values_X: NDArray[Any], at: int, count: int) -> NDArray[Any]:
    """The array with its last value inserted `count` times before index `at`."""
    return np.insert(values_X, at, np.full(count, values_X[-1]))


def segments_of(
    conversations: Sequence[Conversation], streams: Sequence[int], window: int | None = None
) -> Segments | None:
    """Segments of layers that the audio keys of `streams` join; None where attention does not fit into segments.

    Args:
        conversations: of the batch, in order.
        streams: which streams' keys join; they follow the rows in this order.
        window: sliding window in positions, the query's own included. The kernel's window counts keys, so the
            positions of a segment's keys must have no gaps.
    """
    rows, counts = sizes_of(conversations, streams)
    key_firsts = np.cumsum([rows, *counts])
    queries: list[Ints] = []
    keys: list[Ints] = []
    for one, (row_numbers_T, key_numbers) in zip(conversations, numbers_of(conversations, streams), strict=True):
        # numbers below T are rows, those from T on audio keys
        table_X = np.concatenate(
            [row_numbers_T, *(numbers_A + first for numbers_A, first in zip(key_numbers, key_firsts, strict=False))]
        )
        positions_X = np.concatenate([one.positions_T, *(one.keys[s] for s in streams)])
        for own, before in _runs(one, streams, window is not None):
            asking = np.flatnonzero(own < one.shared)
            first = int(asking[-1]) + 1 if len(asking) else 0
            own, before = own[first:], np.concatenate((before, own[:first]))
            if not (own < len(one.positions_T)).any():
                continue  # all its rows are those of another conversation
            if window is not None:
                before = before[positions_X[before] > positions_X[own[0]] - window]
            seen = np.concatenate((before, own))
            if window is not None and not _counts_positions(positions_X[seen], len(own), window):
                return None
            keys.append(table_X[seen])
            queries.append(np.where(own < len(one.positions_T), table_X[own], -1))
    return _joined(queries, keys, rows, rows + sum(counts))


def crossing_segments(conversations: Sequence[Conversation], stream: int) -> Segments:
    """Segments of a cross-attention block on the keys of one stream; each row sees all keys of its segment.

    Rows before all audio have a segment without keys.
    """
    rows, (count,) = sizes_of(conversations, [stream])
    queries, keys = [], []
    for one, (row_numbers_T, (key_numbers_A,)) in zip(conversations, numbers_of(conversations, [stream]), strict=True):
        seen_keys_T = _seen_keys(one, [stream])
        for start, end in _same(seen_keys_T[one.shared :]):
            queries.append(row_numbers_T[one.shared + start : one.shared + end])
            keys.append(key_numbers_A[: seen_keys_T[one.shared + start]])
    return _joined(queries, keys, rows, count)


def sizes_of(conversations: Sequence[Conversation], streams: Sequence[int]) -> tuple[int, list[int]]:
    """Number of rows of the batch, and of audio keys of each stream; shared ones count once."""
    keys = [sum(0 if one.shared else len(one.keys[stream]) for one in conversations) for stream in streams]
    return sum(one.own for one in conversations), keys


def numbers_of(conversations: Sequence[Conversation], streams: Sequence[int]) -> Iterator[tuple[Ints, list[Ints]]]:
    """For each conversation the number in the batch of each row, and of each audio key among those of its stream."""
    found: list[tuple[Ints, list[Ints]]] = []
    row, firsts = 0, [0] * len(streams)
    for one in conversations:
        rows_T = np.arange(row, row + one.own)
        row += one.own
        if one.shared:
            rows_B, keys = found[one.base]
            rows_T = np.concatenate((rows_B[: one.shared], rows_T))
        else:
            keys = [np.arange(len(one.keys[s])) + first for s, first in zip(streams, firsts, strict=True)]
            firsts = [first + len(numbers_A) for first, numbers_A in zip(firsts, keys, strict=True)]
        found.append((rows_T, keys))
        yield rows_T, keys


def _seen_keys(one: Conversation, streams: Sequence[int]) -> Ints:
    """Number of audio keys that each row sees, the earliest ones; never fewer than the row before sees."""
    order_A = np.sort(np.concatenate([np.zeros(0, np.int64), *(one.key_order[s] for s in streams)]))
    seen_keys_T = np.searchsorted(order_A, one.order_T, side="right")
    return np.asarray(np.maximum.accumulate(seen_keys_T) if len(seen_keys_T) else seen_keys_T, dtype=np.int64)


def _runs(one: Conversation, streams: Sequence[int], windowed: bool) -> Iterator[tuple[Ints, Ints]]:
    """Segments of a conversation, each as: its own rows with the keys between them, and all that they see before.

    With sliding windows, no segment has a gap in its positions.
    """
    T = len(one.positions_T)
    order_A = np.argsort(np.concatenate([np.zeros(0, np.int64), *(one.key_order[s] for s in streams)]), kind="stable")
    seen_keys_T = _seen_keys(one, streams)
    # ordered by when queries see them: each key before the rows that see it
    place_T, place_A = 2 * seen_keys_T, 2 * np.arange(len(order_A)) + 1
    shown_T = ~one.repeats_T
    gaps_T = np.zeros(T, bool)
    if windowed:
        gaps_T[1:] = np.diff(one.positions_T) != np.diff(seen_keys_T) + 1
    for start, end in _blocks(seen_keys_T, one.repeats_T, gaps_T):
        known, last = seen_keys_T[start], seen_keys_T[end - 1]
        earlier = np.flatnonzero(shown_T[:start])
        if one.repeats_T[start]:
            text = np.flatnonzero(one.text_T[:start])
            earlier = earlier[earlier != text[-1]] if len(text) else earlier
        before = _merged(earlier, place_T[earlier], order_A[:known] + T, place_A[:known])
        mine = np.arange(start, end)
        yield _merged(mine, place_T[mine], order_A[known:last] + T, place_A[known:last]), before


def _merged(rows: Ints, place_R: Ints, keys: Ints, place_K: Ints) -> Ints:
    order = np.argsort(np.concatenate((place_R, place_K)), kind="stable")
    return np.asarray(np.concatenate((rows, keys))[order], dtype=np.int64)


def _same(counts_T: Ints) -> list[tuple[int, int]]:
    """Runs of rows that see the same number of keys."""
    borders = [0, *(np.flatnonzero(np.diff(counts_T)) + 1), len(counts_T)] if len(counts_T) else [0]
    return [(int(a), int(b)) for a, b in pairwise(borders)]


def _blocks(seen_keys_T: Ints, repeats_T: Bools, gaps_T: Bools) -> Iterator[tuple[int, int]]:
    """Runs that share a segment: only a few keys and no gap lie between them, and no row among them is repeated."""
    start = end = 0
    for a, b in _same(2 * (seen_keys_T + gaps_T.cumsum() + repeats_T.cumsum()) + ~repeats_T):
        if end > start and (
            repeats_T[a] or repeats_T[a - 1] or gaps_T[a] or seen_keys_T[a] - seen_keys_T[a - 1] > BRIDGE
        ):
            yield start, end
            start = a
        end = b
    if end > start:
        yield start, end


def _counts_positions(positions_K: Ints, own: int, window: int) -> bool:
    """True if for all queries of a segment (its last keys) a window in keys equals the window in positions."""
    return bool((np.diff(positions_K) == 1).all()) or (own == 1 and len(positions_K) <= window)


def _joined(queries: list[Ints], keys: list[Ints], rows: int, sources: int) -> Segments:
    cu_seqlens_q, cu_seqlens_k = (np.cumsum([0, *map(len, parts)]) for parts in (queries, keys))
    queries_Q, keys_K = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (queries, keys))
    same_q = len(queries_Q) == rows and bool((queries_Q == np.arange(rows)).all())
    same_k = len(keys_K) == sources and bool((keys_K == np.arange(sources)).all())
    found = Segments(cu_seqlens_q, cu_seqlens_k, None if same_k else keys_K, (), None, None, None)
    if not same_k:
        found = replace(found, back=where(keys_K, sources))
    if not same_q:
        unused_Q = queries_Q < 0
        outs_N = np.zeros(rows, np.int64)
        outs_N[queries_Q[~unused_Q]] = np.flatnonzero(~unused_Q)
        found = replace(found, queries_Q=np.maximum(queries_Q, 0), unused_Q=unused_Q, outs_N=outs_N)
    return found


def where(keys_K: Ints, sources: int) -> tuple[Ints, ...]:
    """Index of each source's first copy among the keys, of its second, and so on; () beyond `COPIES` copies."""
    order_K = np.argsort(keys_K, kind="stable")
    sorted_K = keys_K[order_K]
    nth_K = np.arange(len(keys_K)) - np.searchsorted(sorted_K, sorted_K)
    copies = int(nth_K.max()) + 1 if len(nth_K) else 1
    if copies > COPIES:
        return ()
    places = np.full((copies, sources), len(keys_K))
    places[nth_K, sorted_K] = order_K
    return tuple(places)
