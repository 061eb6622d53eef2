"""Padding of packed batches to sizes that recur, so that one CUDA graph serves many batches.

Nearly every ragged batch has other numbers of rows, keys and audio tokens, and a CUDA graph fixes all of them. So these
numbers are rounded up, by one more conversation, whose rows have no labels, and by audio tokens that no row sees.
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


def uniform(placed: Sequence[SequenceLayout]) -> bool:
    """True if all conversations have equal numbers of rows and of keys, so that sizes recur without filling."""
    return len({(len(one), *(len(keys.clips) for keys in one.keys)) for one in placed}) == 1


def more_tokens(tokens: int, keys: int) -> int:
    """Number of filling audio tokens of a stream with `tokens` tokens, of which the batch has `keys` keys."""
    if not keys:
        return 0
    if keys == tokens:
        return rounded(tokens) - tokens
    # enough tokens that none is used by more keys than `COPIES`, up to which gradients are gathered
    return rounded(tokens - (-(rounded(keys) - keys) // COPIES)) - tokens


def filler(
    placed: Sequence[SequenceLayout], clips: int, tokens: Sequence[int | None]
) -> tuple[SequenceLayout, tuple[int, ...]]:
    """The filling conversation of a batch, and the number of filling audio tokens of each stream.

    Args:
        placed: layouts of the batch's conversations.
        clips: clips in the batch; the filling tokens belong to one more clip.
        tokens: audio tokens of each stream; None where filling tokens are impossible, so that keys are not filled.
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
    """Filling keys: their positions are after all rows of their conversation, so that no row sees them."""
    positions: Ints = np.arange(after, after + count)
    return KeyLayout(
        clips=np.full(count, clip),
        tokens=np.arange(count) % max(1, tokens),
        positions=positions,
        rope_positions=positions,
        about=None,
    )
