"""Attention masks over the rows of the sequence; those over audio keys are in `audio_keys`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pal.backbone.merged import AttentionTile, masked

if TYPE_CHECKING:
    from pal.backbone.context import AudioContext

RowKind = tuple[int | None, tuple[int, ...]]
"""Kind of layer: layers of one kind see the same rows; see `AudioContext.rows_kind`."""


def rows_seen(context: AudioContext, kind: RowKind, valid_BK: Tensor, positions_BQ: Tensor, beams: int) -> Tensor:
    """Which rows each query sees, bool [B, 1, Q, K]: causal by order, windows by position."""
    window, hiding = kind
    K, Q = valid_BK.shape[1], positions_BQ.shape[1]
    index_K = torch.arange(K, device=valid_BK.device)
    index_Q = index_K[-Q:]
    seen_BQK = valid_BK[:, None, :] & (index_K <= index_Q[:, None])
    if window is not None:
        distance_BQK = positions_BQ[:, :, None] - continued(context.rows_BT, K, beams)[:, None, :]
        seen_BQK = seen_BQK & (distance_BQK < window)
    if context.repeats_BT is not None:
        text_BK = valid_BK & ~of_prompt(context.audio_rows_BT, valid_BK, beams)
        repeated_BQ = torch.where(text_BK, index_K, -1).cummax(1).values[:, -Q:]
        asks_BQ = of_prompt(context.repeats_BT, valid_BK, beams)[:, -Q:]
        seen_BQK = seen_BQK & ~(asks_BQ[:, :, None] & (index_K == repeated_BQ[:, :, None]))
    for i in hiding:
        hidden_BK = of_prompt(context.hidden_rows[i][1], valid_BK, beams)
        # a hidden row still sees itself, since a row without any key would be NaN
        seen_BQK = seen_BQK & (~hidden_BK[:, None, :] | (index_K == index_Q[:, None]))
    # padding sees everything, for the same reason; its output is never used
    return (seen_BQK | ~valid_BK[:, -Q:, None])[:, None]


def row_tiles_of(kind: RowKind, valid_BK: Tensor, seen_B1QK: Tensor) -> tuple[AttentionTile, ...]:
    """`rows_seen` as tiles."""
    B, _, Q, K = seen_B1QK.shape
    whole = AttentionTile((0, B), (0, Q), (0, K))
    if kind != (None, ()):
        return masked(seen_B1QK)
    if Q == K and bool((valid_BK[:, :-1] >= valid_BK[:, 1:]).all()):
        return (replace(whole, causal=True),)  # padding is last, where no real row sees it
    return (whole,) if Q == 1 and bool(valid_BK.all()) else masked(seen_B1QK)


def continued(x_BT: Tensor, length: int, beams: int) -> Tensor:
    """Positions or places of the first `length` rows: the prompt's, then those of generated tokens."""
    x_BT = for_beams(x_BT, beams)
    more = length - x_BT.shape[1]
    if more <= 0:
        return x_BT[:, :length]
    # the last real row has the largest, on whichever side the padding is, whose numbers are 0
    return torch.cat((x_BT, x_BT.amax(1, keepdim=True) + torch.arange(1, more + 1, device=x_BT.device)), dim=1)


def of_prompt(x_BT: Tensor, valid_BK: Tensor, beams: int) -> Tensor:
    """A mask over the prompt's rows, extended to all rows so far [B, K] by False for generated ones."""
    x_BK = for_beams(x_BT, beams)[:, : valid_BK.shape[1]]
    return F.pad(x_BK, (0, valid_BK.shape[1] - x_BK.shape[1]))


def for_beams(x: Tensor, beams: int) -> Tensor:
    """Each prompt's [B, ...] repeated for its beams: [B * beams, ...]."""
    return x if beams == 1 else x.repeat_interleave(beams, dim=0)
