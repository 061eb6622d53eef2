"""Padding of packed batches to sizes that recur, so that one CUDA graph serves many batches.

A CUDA graph has fixed numbers of rows, keys and audio tokens, and nearly every ragged batch has others. So these
numbers are rounded up: a filling conversation without labels is added, and audio tokens that no row sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pal.backbone.segments import COPIES
from pal.integrations.sequence_layout import Ints, KeyLayout, SequenceLayout
from pal.types import IGNORE


def rounded(count: int) -> int:
    """`count` rounded up: 16 sizes between successive powers of two, at least 8 apart."""
    if count <= 0:
        return 0
    step = max(8, 2 ** (count - 1).bit_length() // 32)
    return -(-count // step) * step


def uniform(layouts: Sequence[SequenceLayout]) -> bool:
    """True if all conversations have equal numbers of rows and of keys, so that sizes recur without filling."""
    return len({(len(one), *(len(keys.clips) for keys in one.keys)) for one in layouts}) == 1


def filling_tokens(tokens: int, keys: int) -> int:
    """Number of filling audio tokens for a stream with `tokens` tokens, which `keys` keys of the batch refer to."""
    if not keys:
        return 0
    if keys == tokens:
        return rounded(tokens) - tokens
    # so many that at most `COPIES` keys refer to a token; beyond, its gradient would be scattered, not gathered
    return rounded(tokens - (-(rounded(keys) - keys) // COPIES)) - tokens


def filler(
    layouts: Sequence[SequenceLayout], clips: int, tokens: Sequence[int | None], text: int
) -> tuple[SequenceLayout, tuple[int, ...]]:
    """Filling conversation of a batch, and the number of filling audio tokens of each stream.

    Args:
        layouts: layouts of the batch's conversations.
        clips: clips in the batch; the filling tokens belong to one more clip.
        text: text tokens of all conversations.
        tokens: audio tokens of each stream; None if it cannot have filling tokens, so that its keys are not filled.
    """
    rows = sum(len(one) for one in layouts)
    count = rounded(rows + 1) - rows
    more, keys = [], []
    for stream, total in enumerate(tokens):
        used = sum(len(one.keys[stream].clips) for one in layouts)
        added = 0 if total is None else filling_tokens(total, used)
        added_keys = rounded(used) - used if added else 0
        more.append(added)
        keys.append(_keys(clips, added, added_keys, count))
    return (
        SequenceLayout(
            sources=np.full(count, -1),
            clips=np.full(count, -1),
            numbers=np.arange(text, text + count),
            order=np.arange(count),
            positions=np.arange(count),
            labels=np.full(count, IGNORE),
            repeats=np.zeros(count, bool),
            spans=None,
            keys=tuple(keys),
        ),
        tuple(more),
    )


def _keys(clip: int, tokens: int, count: int, after: int) -> KeyLayout:
    """Filling keys: they stand after all rows of their conversation, so that no row sees them."""
    positions: Ints = np.arange(after, after + count)
    return KeyLayout(
        clips=np.full(count, clip),
        tokens=np.arange(count) % max(1, tokens),
        order=positions,
        positions=positions,
        rope_positions=positions,
        spans=None,
    )
