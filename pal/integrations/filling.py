"""Filling packed batches up to sizes that come back, so that a CUDA graph of one batch serves many others.

A ragged batch has its own number of rows, keys and audio tokens nearly every time, and a CUDA graph fixes them all. So
one more conversation of rows that predict nothing, and audio tokens that no row attends to, round these numbers up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pal.backbone.segments import COPIES
from pal.integrations.sequence_layout import Ints, KeyLayout, SequenceLayout
from pal.types import IGNORE


def rounded(count: int) -> int:
    """The next size that batches are filled up to: 16 sizes from one power of two to the next, 8 or more apart."""
    if count <= 0:
        return 0
    step = max(8, 2 ** (count - 1).bit_length() // 32)
    return -(-count // step) * step


def uniform(placed: Sequence[SequenceLayout]) -> bool:
    """Whether all conversations have as many rows and keys, so that their numbers come back without filling."""
    return len({(len(one), *(len(keys.clips) for keys in one.keys)) for one in placed}) == 1


def more_tokens(tokens: int, keys: int) -> int:
    """Audio tokens that fill up a stream of so many, of which a batch has so many keys."""
    if not keys:
        return 0
    if keys == tokens:
        return rounded(tokens) - tokens
    # as few uses of a token that the gradients of all are still gathered
    return rounded(tokens - (-(rounded(keys) - keys) // COPIES)) - tokens


def filler(
    placed: Sequence[SequenceLayout], clips: int, tokens: Sequence[int | None]
) -> tuple[SequenceLayout, tuple[int, ...]]:
    """A conversation that fills up a batch, and how many audio tokens more it needs of each stream.

    Args:
        placed: the batch.
        clips: in the batch; the filling tokens are those of one more.
        tokens: audio tokens of each stream; None where no more can be made, so that its keys are not filled up.
    """
    rows = sum(len(one) for one in placed)
    text = sum(int(one.is_text.sum()) for one in placed)
    count = rounded(rows + 1) - rows
    more, keys = [], []
    for stream, total in enumerate(tokens):
        used = sum(len(one.keys[stream].clips) for one in placed)
        added = 0 if total is None else more_tokens(total, used)
        extra = rounded(used) - used if added else 0
        more.append(added)
        keys.append(_keys(clips, added, extra, count))
    return (
        SequenceLayout(
            sources=np.full(count, -1),
            clips=np.full(count, -1),
            numbers=np.arange(text, text + count),
            positions=np.arange(count),
            labels=np.full(count, IGNORE),
            repeats=np.zeros(count, bool),
            about=None,
            keys=tuple(keys),
        ),
        tuple(more),
    )


def _keys(clip: int, tokens: int, count: int, after: int) -> KeyLayout:
    """Keys behind all rows of their conversation, so that none attends to them."""
    positions: Ints = np.arange(after, after + count)
    return KeyLayout(
        clips=np.full(count, clip),
        tokens=np.arange(count) % max(1, tokens),
        positions=positions,
        rope_positions=positions,
        about=None,
    )
