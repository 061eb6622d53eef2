"""Audio keys and values of a batch, their positions, and which queries see them."""

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
from pal.backbone.score_bias import Bias, KeyScale


@dataclass(frozen=True)
class AudioKeys:
    """Audio keys and values of one stream for a batch of conversations.

    They join the LLM's own keys in `layers`; with `blocks`, only these cross-attention blocks attend to them.
    K/V are not stored: `source` computes them when a layer asks, so that gradient checkpointing can
    drop and recompute them. `prebuilt` computes them once, for decoding.
    """

    source: KeySource
    layers: tuple[int, ...]
    """Layers that attend to them."""
    tokens_BA: Tensor | None
    """Index of each key among the clips' flattened tokens [U * A]; None if conversation i has clip i and no other."""
    order_BA: Tensor
    """Place of each key; a row sees the keys at or before its own place."""
    positions_BA: Tensor
    """Positions in sliding windows."""
    rope_positions_BA: Tensor
    """Positions that RoPE rotates the keys by: the same, except for keys that reserve no position ids."""
    mask_BA: Tensor
    """True where a key is real."""
    blocks: Mapping[int, Block] | None = None
    """Cross-attention block before each layer; None where the layer's own attention sees the keys."""
    built: dict[int, tuple[Tensor, Tensor]] | None = None
    """K after RoPE and V of each layer, each [B, G, A, C], if computed ahead."""
    bias: Bias | None = None
    """Bias on the scores of these keys; None without."""
    scale: KeyScale | None = None
    """Factor on these keys; None without."""
    token_spans: TokenSpans | None = None
    """Stream, clip and time span of each key; only made `with_spans`."""
    gaps: bool = False
    """Keys between real ones may be masked."""

    def without(self, what: AudioMask) -> tuple[AudioKeys, ...]:
        """The keys under a mask: no set, one set, or one set for each of two groups of layers."""
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
        """K after RoPE and V of all conversations, each [B, G, A, C]; each clip is projected once."""
        if llm.recomputes_audio and self.blocks is None and torch.is_grad_enabled():
            # rotation and gathering stay outside, as they save little: so the values' product is not recomputed
            k_UGAC, v_UGAC = checkpoint(self.source.keys_values, layer, use_reentrant=False)
        else:
            k_UGAC, v_UGAC = self.source.keys_values(layer)
        cos_BAC, sin_BAC = rope[llm.layer_types[layer]]
        k_BGAC = rotate(self._to_rows(k_UGAC), cos_BAC, sin_BAC)
        if self.scale is not None:  # here, so that what is recomputed in backward stays the same
            k_BGAC = k_BGAC * self.scale[layer].to(k_BGAC.dtype)[:, None, None]
        return k_BGAC, self._to_rows(v_UGAC)

    def _to_rows(self, x_UGAC: Tensor) -> Tensor:
        if self.tokens_BA is None:
            return x_UGAC[:, :, : self.order_BA.shape[1]]
        return gather(x_UGAC.transpose(1, 2).flatten(0, 1), self.tokens_BA).transpose(1, 2)

    def prebuilt(self, llm: AttentionGeometry) -> AudioKeys:
        """The same keys with every layer's K/V computed now."""
        if self.built is not None:
            return self
        rope = llm.rope(self.rope_positions_BA)
        return replace(self, built={layer: self.keys_values(layer, llm, rope) for layer in self.layers})

    def tiles(
        self, window: int | None, order_BQ: Tensor, positions_BQ: Tensor, beams: int
    ) -> tuple[AttentionTile, ...]:
        """`seen` as tiles."""
        if window is not None or self.gaps:
            return masked(self.seen(window, order_BQ, positions_BQ, beams))
        far = torch.iinfo(self.order_BA.dtype).max
        order_BA = for_beams(self.order_BA.masked_fill(~self.mask_BA, far), beams)
        counts_BQ = torch.searchsorted(order_BA, order_BQ.contiguous(), right=True)
        # padding, whose place is 0, may see any keys
        return prefixes(counts_BQ.cummax(1).values.tolist(), counts_BQ.device)

    def seen(self, window: int | None, order_BQ: Tensor, positions_BQ: Tensor, beams: int) -> Tensor:
        """Which keys each query sees, bool [B, 1, Q, A]: real ones at or before its place, and within the window.

        Args:
            window: sliding window in positions; None: everything.
            order_BQ: places of the queries.
            positions_BQ: their position ids.
            beams: queries of each item.
        """
        seen_BQA = for_beams(self.order_BA, beams)[:, None, :] <= order_BQ[:, :, None]
        seen_BQA = seen_BQA & for_beams(self.mask_BA, beams)[:, None, :]
        if window is not None:
            distance_BQA = positions_BQ[:, :, None] - for_beams(self.positions_BA, beams)[:, None, :]
            seen_BQA = seen_BQA & (distance_BQA < window)
        return seen_BQA[:, None]


def rotate(x_BGAC: Tensor, cos_BAC: Tensor, sin_BAC: Tensor) -> Tensor:
    """RoPE in the half-split layout of all supported families."""
    cos, sin = cos_BAC[:, None], sin_BAC[:, None]
    first, second = x_BGAC.chunk(2, dim=-1)
    return x_BGAC * cos + torch.cat((-second, first), dim=-1) * sin


def gather(table_X: Tensor, index_BT: Tensor) -> Tensor:
    """Entries [X, ...] by index -> [B, T, ...]; its backward is faster than that of `table_X[index_BT]`."""
    return table_X.index_select(0, index_BT.flatten()).unflatten(0, index_BT.shape)
