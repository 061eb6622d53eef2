"""Tiles of packed rows: which rows and audio keys each row sees, for attention on a CPU.

A conversation's own rows see one another causally. Rows that follow a shared prefix see all of it, and all of its audio
keys; those of neighbours lie one after the other and are one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pal.backbone.merged import AttentionTile, prefixes
from pal.backbone.segments import Conversation, numbers_of

_ROW = (0, 1)
"""All packed rows are one row of the batch."""


@dataclass(frozen=True)
class PackedTiles:
    """Tiles of a packed batch, for layers without sliding windows."""

    rows: tuple[AttentionTile, ...]
    """Of the rows among themselves."""
    keys: Mapping[int, tuple[AttentionTile, ...]]
    """Of the rows and each stream's audio keys."""


def tiles_of(conversations: Sequence[Conversation], streams: Sequence[int], device: torch.device) -> PackedTiles:
    """Tiles of conversations without repeated rows."""
    rows: list[AttentionTile] = []
    keys: dict[int, list[AttentionTile]] = {stream: [] for stream in streams}
    numbered = list(numbers_of(conversations, streams))
    for one, (row_numbers_T, key_numbers) in zip(conversations, numbered, strict=True):
        first, last = int(row_numbers_T[one.shared]), int(row_numbers_T[-1]) + 1
        rows.append(AttentionTile(_ROW, (first, last), (first, last), causal=True))
        for stream, numbers_A in zip(streams, key_numbers, strict=True):
            if one.shared or not len(numbers_A):
                continue
            counts_T = np.searchsorted(one.key_order[stream], one.order_T, side="right")
            own = prefixes([counts_T.tolist()], device)
            keys[stream] += [_moved(tile, first, int(numbers_A[0])) for tile in own if tile.keys[1] > tile.keys[0]]
    for base, first, last in _followers(conversations):
        own_rows, of_base = numbered[first][0], numbered[base][0]
        queries = (int(own_rows[conversations[first].shared]), int(numbered[last - 1][0][-1]) + 1)
        rows.append(AttentionTile(_ROW, queries, (int(of_base[0]), int(of_base[conversations[first].shared - 1]) + 1)))
        for stream, numbers_A in zip(streams, numbered[base][1], strict=True):
            if len(numbers_A):
                keys[stream].append(AttentionTile(_ROW, queries, (int(numbers_A[0]), int(numbers_A[-1]) + 1)))
    return PackedTiles(tuple(rows), {stream: tuple(tiles) for stream, tiles in keys.items()})


def _followers(conversations: Sequence[Conversation]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbours with one base: its number, the first of them, and one past the last."""
    number = 0
    while number < len(conversations):
        end = number + 1
        if conversations[number].shared:
            while end < len(conversations) and conversations[end].base == conversations[number].base:
                end += 1
            yield conversations[number].base, number, end
        number = end


def _moved(tile: AttentionTile, row: int, key: int) -> AttentionTile:
    """A tile of one conversation in the packed batch."""
    (first, last), (low, high) = tile.queries, tile.keys
    return replace(tile, rows=_ROW, queries=(first + row, last + row), keys=(low + key, high + key))
