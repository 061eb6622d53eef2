"""Audio keys and values of a batch, the positions they stand at, and which queries see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pal.backbone.attention_masks import for_beams
from pal.backbone.audio_mask import AudioMask, TokenSpans
from pal.backbone.interfaces import AttentionGeometry, Block, KeySource, Rope
from pal.backbone.merged import AttentionTile, masked, prefixes


@dataclass(frozen=True)
class AudioKeys:
    """Keys and values of one kind of token (one integration, one encoder) for a batch of rows.

    They join the LLM's own keys in `layers`, or, where there are `blocks`, only those look at them.
    Nothing is computed here: `source` makes K/V when a layer asks, so that gradient checkpointing can
    drop and recompute them; `prebuilt` makes them once, for decoding.
    """

    source: KeySource
    layers: tuple[int, ...]
    """Layers whose text rows see them."""
    tokens_BA: Tensor | None
    """For each key of a row, its place in the clips' flattened [U * A]; None when row i has clip i, and only that."""
    positions_BA: Tensor
    """A row sees the keys at or before its own position."""
    rope_positions_BA: Tensor
    """Positions that RoPE turns the keys by: the same, but for keys that reserve no positions of their own."""
    mask_BA: Tensor
    """True where a key is real."""
    blocks: Mapping[int, Block] | None = None
    """What stands before a layer and looks at them there; None where the layer's own attention does."""
    built: dict[int, tuple[Tensor, Tensor]] | None = None
    """K after RoPE and V per layer, each [B, G, A, C], when they were made ahead."""
    token_spans: TokenSpans | None = None
    """What each key stands for, where that was asked for."""
    gaps: bool = False
    """Whether keys between real ones may be masked."""

    def without(self, what: AudioMask) -> tuple[AudioKeys, ...]:
        """The same keys as far as they are still seen: none, one set, or one for each of two groups of layers."""
        hidden_BA = self.mask_BA
        if what.placed:
            assert self.token_spans is not None, "made without `with_spans`"
            hidden_BA = self.token_spans.chosen(what) & self.mask_BA
        if not bool(hidden_BA.any()):
            return (self,)
        layers = self.layers if what.layers is None else what.layers
        parts = [replace(self, layers=tuple(layer for layer in self.layers if layer not in layers))]
        if not torch.equal(hidden_BA, self.mask_BA):
            inside = tuple(layer for layer in self.layers if layer in layers)
            parts.append(replace(self, layers=inside, mask_BA=self.mask_BA & ~hidden_BA, gaps=True))
        return tuple(part for part in parts if part.layers)

    def keys_values(self, layer: int, llm: AttentionGeometry, rope: Rope) -> tuple[Tensor, Tensor]:
        """K after RoPE and V of every row, each [B, G, A, C]; clips are projected once, then shared by rows."""
        if llm.recomputes_audio and self.blocks is None and torch.is_grad_enabled():
            # without rotation and rows, which keep nothing large, the values' product need not be made again
            k_UGAC, v_UGAC = checkpoint(self.source.keys_values, layer, use_reentrant=False)
        else:
            k_UGAC, v_UGAC = self.source.keys_values(layer)
        cos_BAC, sin_BAC = rope[llm.layer_types[layer]]
        return rotate(self._to_rows(k_UGAC), cos_BAC, sin_BAC), self._to_rows(v_UGAC)

    def _to_rows(self, x_UGAC: Tensor) -> Tensor:
        if self.tokens_BA is None:
            return x_UGAC[:, :, : self.positions_BA.shape[1]]
        return gather(x_UGAC.transpose(1, 2).flatten(0, 1), self.tokens_BA).transpose(1, 2)

    def prebuilt(self, llm: AttentionGeometry) -> AudioKeys:
        """The same with every layer's K/V made now."""
        if self.built is not None:
            return self
        rope = llm.rope(self.rope_positions_BA)
        return replace(self, built={layer: self.keys_values(layer, llm, rope) for layer in self.layers})

    def tiles(
        self, window: int | None, positions_BQ: Tensor, beams: int, ahead_BQ: Tensor | None = None
    ) -> tuple[AttentionTile, ...]:
        """The same as `seen`, as rectangles."""
        if window is not None or self.gaps:
            return masked(self.seen(window, positions_BQ, beams, ahead_BQ))
        far = torch.iinfo(self.positions_BA.dtype).max
        positions_BA = for_beams(self.positions_BA.masked_fill(~self.mask_BA, far), beams)
        reach_BQ = positions_BQ if ahead_BQ is None else positions_BQ + ahead_BQ
        counts_BQ = torch.searchsorted(positions_BA, reach_BQ.contiguous(), right=True)
        # padding, whose position is 0, may see what it likes
        return prefixes(counts_BQ.cummax(1).values.tolist(), counts_BQ.device)

    def seen(self, window: int | None, positions_BQ: Tensor, beams: int, ahead_BQ: Tensor | None = None) -> Tensor:
        """Which keys each query sees, bool [B, 1, Q, A]: the real ones at or before its position.

        Those of `ahead_BQ` also see keys one position later, where the row stands that they predict.
        """
        distance_BQA = positions_BQ[:, :, None] - for_beams(self.positions_BA, beams)[:, None, :]
        reach_BQA = distance_BQA if ahead_BQ is None else distance_BQA + ahead_BQ[:, :, None]
        seen_BQA = for_beams(self.mask_BA, beams)[:, None, :] & (reach_BQA >= 0)
        return (seen_BQA if window is None else seen_BQA & (distance_BQA < window))[:, None]


def rotate(x_BGAC: Tensor, cos_BAC: Tensor, sin_BAC: Tensor) -> Tensor:
    """RoPE in the half-split layout that all supported families share."""
    cos, sin = cos_BAC[:, None], sin_BAC[:, None]
    first, second = x_BGAC.chunk(2, dim=-1)
    return x_BGAC * cos + torch.cat((-second, first), dim=-1) * sin


def gather(table_X: Tensor, index_BT: Tensor) -> Tensor:
    """Entries [X, ...] by index -> [B, T, ...]; quicker to differentiate than `table_X[index_BT]`."""
    return table_X.index_select(0, index_BT.flatten()).unflatten(0, index_BT.shape)
