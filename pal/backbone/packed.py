"""Packed rows: all conversations one after the other, without padding; for training and prefill on a GPU.

`PackedContext` takes the place of an `AudioContext`. The layout is computed on the host (`segments`), so nothing here
waits for the device, and a layer's attention takes the same few operations for any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pal.backbone.audio_keys import rotate
from pal.backbone.interfaces import AttentionGeometry, KeySource, PackedBlock
from pal.backbone.merged import AttentionTile, TiledKeys, merged_attention
from pal.backbone.packed_tiles import PackedTiles
from pal.backbone.rms import rms_norm
from pal.backbone.score_bias import Bias, KeyScale, SetBias, with_bias
from pal.backbone.segments import Conversation
from pal.backbone.varlen import segment_attention

RopeTable = tuple[Tensor, Tensor]
"""Cos and sin of the LLM's rotary embedding, each [I, C]."""


@dataclass(frozen=True, eq=False)
class DeviceSegments:
    """Tensors of `segments.Segments` on the device."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys_K: Tensor | None
    back: tuple[Tensor, ...]
    queries_Q: Tensor | None
    queries_back_Q: Tensor | None
    """The queries' rows again, but N for dummy queries."""
    outs_N: Tensor | None


@dataclass(frozen=True, eq=False)
class Projection:
    """Computes a layer's audio K/V from features, inside the layer, which may be compiled and recomputed whole."""

    x_ME: Tensor
    """Features of all clips' real tokens."""
    projector: nn.Module
    norm: nn.Module
    dtype: torch.dtype
    """Dtype of the LLM."""
    gain: tuple[nn.Parameter, float] | None
    """Weight and epsilon of the norm where it is a plain RMSNorm, for which torch has one kernel; None: call `norm`."""
    recomputes: bool
    """Recompute projector activations in backward."""
    random: bool
    """The projector has dropout, such as that of adapters."""

    def keys_values(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [M, G, C], by a layer's own norm and projections."""
        if self.recomputes and torch.is_grad_enabled():
            u_MD = checkpoint(self._normed, self.x_ME, use_reentrant=False, preserve_rng_state=self.random)
        else:
            u_MD = self._normed(self.x_ME)
        shape = (u_MD.shape[0], -1, attention.head_dim)
        k_MGC, v_MGC = attention.k_proj(u_MD).view(shape), attention.v_proj(u_MD).view(shape)
        norm = getattr(attention, "k_norm", None)
        return (k_MGC if norm is None else norm(k_MGC)), v_MGC

    def _normed(self, x_ME: Tensor) -> Tensor:
        u_MD = self.projector(x_ME).to(self.dtype)
        if self.gain is None:
            normed: Tensor = self.norm(u_MD)
            return normed
        return rms_norm(u_MD, *self.gain)


class KVSink(Protocol):
    """Sink for the audio keys and values that a layer makes, [I, G, C] each, for decoding."""

    joined: list[tuple[Tensor, Tensor]]
    """K and V of each set that joins the layer's own keys."""
    crossed: dict[int, tuple[Tensor, Tensor]]
    """K and V of each set that a cross-attention block before the layer attends to, by its number."""


@runtime_checkable
class PackedSource(KeySource, Protocol):
    """A `KeySource` that can also compute K/V of packed tokens, without padding."""

    def ready(self, more: int | None) -> None:
        """Compute what all layers share: with `more` filling tokens for packed rows; None: for padded rows."""
        ...

    def projection(self, layer: int) -> Projection:
        """Projection of a layer."""
        ...


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """Audio keys of one stream."""

    source: KeySource
    stream: int
    layers: tuple[int, ...]
    tokens_I: Tensor | None
    """Index of each key among the source's tokens; None where each token is used once, in order."""
    tokens_back: tuple[Tensor, ...]
    rope_table: Mapping[str, RopeTable]
    """Cos and sin by type of layer."""
    blocks: Mapping[int, PackedBlock] | None
    crossing: DeviceSegments | None
    """Segments of cross-attention blocks."""
    sees_audio_N1: Tensor | None
    """True for rows that see any of the keys; only with blocks."""
    bias: Bias | None = None
    """Bias on the scores of these keys."""
    scale: KeyScale | None = None
    """Factor on these keys."""

    @cached_property
    def _packs(self) -> bool:
        # asked once for all layers: looking at a protocol takes as long as a small kernel
        return isinstance(self.source, PackedSource)

    def made(self, layer: int) -> Projection | tuple[Tensor, Tensor]:
        """Projection of a layer, or the K/V of all tokens where the source has them already."""
        if self._packs:
            return self.source.projection(layer)  # type: ignore[attr-defined]
        return flat(*self.source.keys_values(layer))


@dataclass(frozen=True, eq=False)
class PackedRowBias:
    """Bias on the scores of a stream's audio rows as keys."""

    stream: int
    bias: Bias
    rows_N: Tensor
    """True for the stream's rows."""


@dataclass(frozen=True, eq=False)
class PackedContext:
    """Layout of a packed batch, and its audio keys."""

    llm: AttentionGeometry
    lengths: tuple[int, ...]
    """Rows of each conversation, without those that it shares; those of a filling one follow and are not counted."""
    segments: tuple[DeviceSegments, ...]
    """Segments of each kind of layer; empty where conversations form a rectangle [B, T] without audio keys."""
    kinds: tuple[int, ...]
    """Index in `segments` of each layer."""
    conversations: tuple[Conversation, ...]
    """Order and positions of each conversation's rows and keys; on the host."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None where it covers the whole sequence."""
    keys: tuple[PackedKeys, ...]
    row_biases: tuple[PackedRowBias, ...] = ()
    tiles: PackedTiles | None = None
    """Tiles in place of segments, on a CPU."""

    def mask(self, mask_BT: Tensor) -> Tensor:
        """Placeholder mask [1, 1, 1, 1]: given a 4-dimensional mask, transformers makes none."""
        return mask_BT[:1, :1, None, None]

    def key_counts(self, which: int) -> tuple[int, ...]:
        """Audio keys of each conversation in one of the `keys`."""
        return tuple(len(one.keys[self.keys[which].stream]) for one in self.conversations)

    def joined(self, layer: int) -> tuple[int, ...]:
        """Numbers of the `keys` that join the layer's own keys."""
        return tuple(i for i, one in enumerate(self.keys) if one.blocks is None and layer in one.layers)

    def at(self, layer: int, kv_sink: KVSink | None = None) -> PackedLayer:
        """Attention metadata of one layer; `kv_sink` receives its audio keys and values."""
        if not self.segments and self.tiles is None:
            return PackedLayer(None, None, ())
        kind = self.llm.layer_types[layer]
        joined = tuple(
            JoinedKeys(
                one.made(layer),
                one.rope_table[kind],
                one.tokens_I,
                one.tokens_back,
                (one.bias or {}).get(layer),
                (one.scale or {}).get(layer),
            )
            for one in (self.keys[i] for i in self.joined(layer))
        )
        own = tuple((one.bias[layer], one.rows_N[:, None]) for one in self.row_biases if layer in one.bias)
        if self.tiles is not None:
            tiles = (self.tiles.rows, *(self.tiles.keys[self.keys[i].stream] for i in self.joined(layer)))
            return PackedLayer(None, None, joined, kv_sink, own, tiles)
        return PackedLayer(self.segments[self.kinds[layer]], self.windows[layer], joined, kv_sink, own)

    def crosses(self, layer: int) -> bool:
        """Whether blocks stand before a layer."""
        return any(one.blocks is not None and layer in one.layers for one in self.keys)

    def cross(self, layer: int, x_1ND: Tensor, kv_sink: KVSink | None = None) -> Tensor:
        """The rows that go into a layer, after the blocks that stand before it."""
        for which, one in enumerate(self.keys):
            if one.blocks is None or layer not in one.layers:
                continue
            made = one.made(layer)
            assert isinstance(made, tuple) and one.crossing is not None and one.sees_audio_N1 is not None
            joined = JoinedKeys(made, one.rope_table[self.llm.layer_types[layer]], one.tokens_I, one.tokens_back)
            rotated = joined.rotated(None)
            if kv_sink is not None:
                kv_sink.crossed[which] = rotated
            x_1ND = one.blocks[layer].packed(x_1ND, *rotated, one.crossing, one.sees_audio_N1)
        return x_1ND


@dataclass(frozen=True, eq=False)
class JoinedKeys:
    """Audio keys that join a layer's own."""

    made: Projection | tuple[Tensor, Tensor]
    rope_table: RopeTable
    tokens_I: Tensor | None
    tokens_back: tuple[Tensor, ...]
    bias: Tensor | None = None
    scale: Tensor | None = None

    def rotated(self, attention: Any) -> tuple[Tensor, Tensor]:
        """K after RoPE and V, each [I, G, C]."""
        k_MGC, v_MGC = self.made if isinstance(self.made, tuple) else self.made.keys_values(attention)
        if self.tokens_I is not None:
            k_MGC, v_MGC = (take_rows(x, self.tokens_I, self.tokens_back) for x in (k_MGC, v_MGC))
        k_IGC = rotate(k_MGC, *self.rope_table)
        return (k_IGC if self.scale is None else k_IGC * self.scale.to(k_IGC.dtype)[:, None]), v_MGC


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """Attention metadata of one layer with packed rows; without segments, attention is transformers' causal one."""

    segments: DeviceSegments | None
    window: int | None
    joined: tuple[JoinedKeys, ...]
    kv_sink: KVSink | None = None
    own: tuple[SetBias, ...] = ()
    """Biases on the scores of the layer's own keys."""
    tiles: tuple[tuple[AttentionTile, ...], ...] | None = None
    """Tiles of the rows, and of each set of audio keys, in place of segments."""

    @property
    def causal(self) -> bool:
        """True if attention is transformers' causal one."""
        return self.segments is None and self.tiles is None

    def attend(self, attention: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Queries [1, H, N, C], keys and values [1, G, N, C], after RoPE -> [1, N, H, C]."""
        if self.tiles is not None:
            own = tuple((bias[..., None], None if rows is None else rows.T[None]) for bias, rows in self.own)
            sets = [TiledKeys(key, value, self.tiles[0], own)]
            for one, tiles in zip(self.joined, self.tiles[1:], strict=True):
                if tiles:
                    k_1GIC, v_1GIC = (x_IGC.transpose(0, 1)[None] for x_IGC in one.rotated(attention))
                    sets.append(
                        TiledKeys(k_1GIC, v_1GIC, tiles, () if one.bias is None else ((one.bias[:, None], None),))
                    )
            return merged_attention(query, sets, scale).contiguous()
        segments = self.segments
        assert segments is not None
        dtype = query.dtype
        if torch.is_autocast_enabled(query.device.type):
            # under autocast, rotary embeddings return float32 queries, and autocast does not cast for this kernel
            dtype = torch.get_autocast_dtype(query.device.type)
        q_NHC, k_KGC, v_KGC = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
        made = [one.rotated(attention) for one in self.joined]
        if made and self.kv_sink is not None:
            self.kv_sink.joined = made
        keys, values = ([own, *(pair[i].to(dtype) for pair in made)] for i, own in enumerate((k_KGC, v_KGC)))
        biases = [self.own, *(() if one.bias is None else ((one.bias, None),) for one in self.joined)]
        if any(biases):
            q_NHC, keys, values, scale = with_bias(q_NHC, keys, values, biases, scale)
        k_KGC, v_KGC = (torch.cat(parts) if made else parts[0] for parts in (keys, values))
        if segments.keys_K is not None:
            k_KGC, v_KGC = (take_rows(x, segments.keys_K, segments.back) for x in (k_KGC, v_KGC))
        out_NHC = packed_attention(segments, q_NHC, k_KGC, v_KGC, True, self.window, scale)
        width = query.shape[-1]
        return (out_NHC if out_NHC.shape[-1] == width else out_NHC[..., :width]).unsqueeze(0)


def packed_attention(
    segments: DeviceSegments,
    q_NHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attention of packed rows [N, H, C] to the keys of their segments -> [N, H, C]."""
    if segments.queries_Q is not None:
        assert segments.outs_N is not None and segments.queries_back_Q is not None
        q_NHC = take_rows(q_NHC, segments.queries_Q, (segments.outs_N,))
    out_QHC = segment_attention(
        q_NHC,
        k_KGC,
        v_KGC,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        causal,
        window,
        scale,
    )
    if segments.outs_N is None:
        return out_QHC
    assert segments.queries_back_Q is not None
    return take_rows(out_QHC, segments.outs_N, (segments.queries_back_Q,))


def take_rows(x_X: Tensor, index_Y: Tensor, back: tuple[Tensor, ...]) -> Tensor:
    """Entries [X, ...] by index -> [Y, ...].

    Args:
        x_X: the entries.
        index_Y: which.
        back: index of each entry's first copy in the result, of its second, and so on, [X] each; Y for none. With
            it the gradient is gathered, in a fixed order and without atomic additions; else it is scattered.
    """
    if not torch.is_grad_enabled() or not back:  # compiled, the function below cannot be traced without gradients
        return x_X.index_select(0, index_Y)
    first, second, third = (*back, None, None)[:3]
    taken: Tensor = _Take.apply(x_X, index_Y, first, second, third)
    return taken


class _Take(torch.autograd.Function):
    # `segments.COPIES` arguments by name: a compiled layer cannot trace a variable number

    @staticmethod
    def forward(
        ctx: Any, x_X: Tensor, index_Y: Tensor, first_X: Tensor, second_X: Tensor | None, third_X: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(first_X, second_X, third_X)
        return x_X.index_select(0, index_Y)

    @staticmethod
    def backward(ctx: Any, grad_Y: Tensor) -> Any:
        first_X, second_X, third_X = ctx.saved_tensors
        # a row of zeros at the end, for entries without a copy
        grad_Y = F.pad(grad_Y, (0, 0) * (grad_Y.ndim - 1) + (0, 1))
        grad_X = grad_Y.index_select(0, first_X)
        if second_X is not None:
            grad_X = grad_X + grad_Y.index_select(0, second_X)
        if third_X is not None:
            grad_X = grad_X + grad_Y.index_select(0, third_X)
        return grad_X, None, None, None, None


def flat(k_UGAC: Tensor, v_UGAC: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of padded clips [U, G, A, C], flattened to [U A, G, C] each."""
    return k_UGAC.transpose(1, 2).flatten(0, 1), v_UGAC.transpose(1, 2).flatten(0, 1)
