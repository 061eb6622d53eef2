"""Transfer of layouts to the device: all arrays of a batch are moved in one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pal.backbone.llm import Backbone
from pal.backbone.packed import DeviceSegments, PackedKeys, RopeTable
from pal.backbone.segments import Conversation, Segments, crossing_segments, where
from pal.integrations.filling import rounded
from pal.integrations.sequence_layout import Ints, SequenceLayout
from pal.transfer import move
from pal.types import IGNORE, Targets

if TYPE_CHECKING:
    from pal.integrations.assembling import IntegrationOutput


class Moves:
    """Collected arrays, moved to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.generic]] = []
        self._moved: list[Tensor] = []

    def add(self, array: NDArray[np.generic]) -> int:
        """Add an array; returns its number, to get it by after the move."""
        self._arrays.append(array)
        return len(self._arrays) - 1

    def add_optional(self, array: NDArray[np.generic] | None) -> int | None:
        """Add an array, if there is one."""
        return None if array is None else self.add(array)

    def go(self, device: torch.device) -> None:
        """Move all added arrays."""
        self._moved = move(self._arrays, device)

    def __getitem__(self, number: int) -> Tensor:
        return self._moved[number]

    def get(self, number: int | None) -> Tensor | None:
        """Moved array of a number; None for None."""
        return None if number is None else self._moved[number]


@dataclass(frozen=True)
class MovedSegments:
    """`Segments` before the move: numbers of arrays in `Moves`."""

    cu_seqlens: tuple[int, int]
    """Of queries and of keys."""
    longest: tuple[int, int]
    """Largest number of queries and of keys in a segment; these are the numbers themselves."""
    keys: int | None
    back: tuple[int, ...]
    queries: tuple[int, int, int] | None
    """`queries_Q`, `queries_back_Q` and `outs_N` of `DeviceSegments`; None: the queries are the rows in order."""


def move_segments(segments: Segments, moves: Moves, size: Callable[[int], int] | None = None) -> MovedSegments:
    """Add segments to `moves`; `size` rounds up the largest numbers of queries and keys."""
    max_seqlen_q, max_seqlen_k = segments.longest
    queries = None
    if segments.queries_Q is not None and segments.outs_N is not None and segments.unused_Q is not None:
        back_Q = np.where(segments.unused_Q, len(segments.outs_N), segments.queries_Q)
        queries = (moves.add(segments.queries_Q), moves.add(back_Q), moves.add(segments.outs_N))
    return MovedSegments(
        cu_seqlens=(moves.add(segments.cu_seqlens_q), moves.add(segments.cu_seqlens_k)),
        longest=(max_seqlen_q, max_seqlen_k) if size is None else (size(max_seqlen_q), size(max_seqlen_k)),
        keys=moves.add_optional(segments.keys_K),
        back=tuple(moves.add(places) for places in segments.back),
        queries=queries,
    )


def device_segments(moves: Moves, moved: MovedSegments) -> DeviceSegments:
    """Segments on the device, after the move."""
    queries = (None, None, None) if moved.queries is None else tuple(moves[i] for i in moved.queries)
    return DeviceSegments(
        cu_seqlens_q=moves[moved.cu_seqlens[0]],
        cu_seqlens_k=moves[moved.cu_seqlens[1]],
        max_seqlen_q=moved.longest[0],
        max_seqlen_k=moved.longest[1],
        keys_K=moves.get(moved.keys),
        back=tuple(moves[i] for i in moved.back),
        queries_Q=queries[0],
        queries_back_Q=queries[1],
        outs_N=queries[2],
    )


class MovedKeys:
    """Audio keys of one stream, before and after the move to the device."""

    def __init__(
        self,
        stream: int,
        output: IntegrationOutput,
        more: int,
        layouts: list[SequenceLayout],
        conversations: list[Conversation],
        moves: Moves,
        size: Callable[[int], int] | None,
    ) -> None:
        self.output, self.stream = output, stream
        key_layouts = [one.keys[stream] for one in layouts]
        tokens_I = np.concatenate([output.firsts[one.clips] + one.tokens for one in key_layouts])
        total = int(output.firsts[-1]) + more
        self.tokens: int | None = None
        self.back: list[int] = []
        if not np.array_equal(tokens_I, np.arange(total)):
            self.tokens = moves.add(tokens_I)
            self.back = [moves.add(x) for x in where(tokens_I, total)]
        self.rope_positions = moves.add(np.concatenate([one.rope_positions for one in key_layouts]))
        self.crossing: MovedSegments | None = None
        if output.blocks is not None:
            crossing = crossing_segments(conversations, stream)
            self.crossing = move_segments(crossing, moves, size)
            self.queries_with_keys = moves.add(crossing.queries_with_keys())

    def keys(self, moves: Moves, llm: Backbone) -> PackedKeys:
        """The keys after the move."""
        rope = llm.rope(moves[self.rope_positions][None])
        rope_table: dict[str, RopeTable] = {kind: (cos[0], sin[0]) for kind, (cos, sin) in rope.items()}
        assert self.output.keys is not None
        return PackedKeys(
            source=self.output.keys,
            stream=self.stream,
            layers=self.output.layers,
            tokens_I=moves.get(self.tokens),
            tokens_back=tuple(moves[i] for i in self.back),
            rope_table=rope_table,
            blocks=self.output.blocks,
            crossing=None if self.crossing is None else device_segments(moves, self.crossing),
            sees_audio_N1=None if self.crossing is None else moves[self.queries_with_keys].bool()[:, None],
            bias=self.output.bias,
            scale=self.output.scale,
        )


class MovedTargets:
    """Targets (rows that predict a labelled token), before and after the move to the device."""

    def __init__(
        self, layouts: list[SequenceLayout], numbers: Sequence[Ints], moves: Moves, filling: Sequence[int] = ()
    ) -> None:
        """Find the targets.

        Args:
            layouts: of the conversations.
            numbers: number of each row in the batch, for each conversation.
            moves: for the move to the device.
            filling: lengths of filling conversations, if any; targets without label are then added, too.
        """
        rows, labels, owners = [], [], []
        self.lengths: list[int] = []
        for number, (one, row_numbers_T) in enumerate(zip(layouts, numbers, strict=True)):
            # no row predicts the first token of a conversation
            at = np.flatnonzero(one.labels[1:] != IGNORE)
            starts = np.diff(at, prepend=-2) != 1
            self.lengths += np.diff([*np.flatnonzero(starts), len(at)]).tolist()
            rows.append(row_numbers_T[at])
            labels.append(one.labels[1:][at])
            owners.append(np.full(len(at), number))
        self.conversations = len(layouts)
        joined = [np.concatenate(parts) for parts in (rows, labels, owners)]
        more = rounded(len(joined[0])) - len(joined[0]) if filling else 0
        fills = (0, IGNORE, 0)
        self._at = [
            moves.add(np.pad(x, (0, more), constant_values=fill)) for x, fill in zip(joined, fills, strict=True)
        ]
        ignored = np.full(sum(filling), IGNORE)
        self._all = moves.add(np.concatenate([*(one.own.labels for one in layouts), ignored]))

    def made(self, moves: Moves) -> Targets:
        """The targets after the move."""
        rows_N, labels_N, owners_N = (moves[i] for i in self._at)
        return Targets(rows_N, labels_N.long(), owners_N, tuple(self.lengths), self.conversations)

    def labels(self, moves: Moves, shape: tuple[int, int]) -> Tensor:
        """The label of each row, after the move."""
        return moves[self._all].long().view(shape)
