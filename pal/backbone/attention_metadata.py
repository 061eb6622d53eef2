"""`AttentionMetadata`: which rows and audio keys the queries of one forward see, computed once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal.backbone.attention_masks import RowKind, continued, for_beams, of_prompt, row_tiles_of, rows_seen
from pal.backbone.interfaces import Rope
from pal.backbone.kernels import supports_split_attention
from pal.backbone.merged import AttentionTile, TiledKeys, masked
from pal.backbone.observers import AttentionWeights, attention_weights
from pal.backbone.score_bias import SetBias, with_bias
from pal.errors import PalError

if TYPE_CHECKING:
    from pal.backbone.context import AudioContext


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Masks, tiles and RoPE of an `AudioContext` for the query rows of one forward."""

    context: AudioContext
    beams: int
    ropes: tuple[Rope, ...]
    """Cos and sin for each of the context's `keys`."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None where it covers the whole sequence."""
    kinds: tuple[RowKind, ...]
    """Key of each layer in `rows_seen`."""
    rows_seen: dict[RowKind, Tensor]
    """Which rows each query sees, by kind of layer: bool [B, 1, Q, K]."""
    row_tiles: dict[RowKind, tuple[AttentionTile, ...]] | None
    """The same as tiles; None where attention runs under one mask over all keys."""
    keys_seen: dict[tuple[int, int | None], Tensor]
    """Which audio keys each query sees, by number in `keys` and sliding window: bool [B, 1, Q, A]."""
    key_tiles: dict[tuple[int, int | None], tuple[AttentionTile, ...]]
    """The same as tiles."""
    cross_seen: tuple[Tensor | None, ...]
    """Which audio keys each query sees in cross-attention blocks: bool [B, 1, Q, A]; None for keys without blocks."""
    biased_rows: tuple[Tensor, ...]
    """Rows [B, 1, K] of each of the context's `row_biases`."""

    @classmethod
    def of(cls, context: AudioContext, attention_mask: Tensor | None, position_ids: Tensor | None) -> AttentionMetadata:
        """The metadata of one forward.

        Args:
            context: audio keys and values of the batch.
            attention_mask: [B, K] over all rows so far, cached ones included.
            position_ids: [B, Q] of the query rows. B may be a multiple of the context's batch (beams).

        Raises:
            PalError: when either is missing, since transformers would then guess, silently and wrongly.
        """
        if attention_mask is None or position_ids is None:
            name = "attention_mask" if attention_mask is None else "position_ids"
            raise PalError(f"a forward with audio needs {name}: positions have gaps that cannot be guessed")
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            raise PalError("a forward with audio needs the 2-D attention mask, one number per row so far")
        context.llm.check_attention()
        beams, rest = divmod(position_ids.shape[0], context.rows_BT.shape[0])
        if rest or position_ids.shape[0] != attention_mask.shape[0]:
            raise PalError(
                f"audio of {context.rows_BT.shape[0]} conversations does not fit position_ids of "
                f"{position_ids.shape[0]} and attention_mask of {attention_mask.shape[0]}"
            )
        # rows of a clip may have negative positions, or share them, and transformers counts rows
        far = max(int(position_ids.max() - context.rows_BT.min().clamp(max=0)), attention_mask.shape[1] - 1)
        windows = tuple(None if window is None or window > far else window for window in context.llm.windows)
        valid_BK = attention_mask.bool()
        kinds = tuple(context.rows_kind(layer, window) for layer, window in enumerate(windows))
        seen = {
            kind: rows_seen(context, kind, valid_BK, position_ids, beams)
            for layer, kind in enumerate(kinds)
            if context.joined(layer)
            or kind != (None, ())
            or context.observer is not None
            or _row_biases(context, layer)
        }
        order_BQ = continued(context.order_BT, valid_BK.shape[1], beams)[:, -position_ids.shape[1] :]
        joined = {(i, windows[layer]) for layer in range(len(windows)) for i in context.joined(layer)}
        device = position_ids.device
        apart = not context.llm.dropout and supports_split_attention(device)
        return cls(
            context=context,
            beams=beams,
            windows=windows,
            kinds=kinds,
            ropes=tuple(
                {} if keys.built is not None else context.llm.rope(keys.rope_positions_BA) for keys in context.keys
            ),
            rows_seen=seen,
            row_tiles={kind: row_tiles_of(kind, valid_BK, seen_B1QK) for kind, seen_B1QK in seen.items()}
            if apart
            else None,
            keys_seen={}
            if apart and context.observer is None
            else {(i, w): context.keys[i].seen(w, order_BQ, position_ids, beams) for i, w in joined},
            key_tiles={(i, w): context.keys[i].tiles(w, order_BQ, position_ids, beams) for i, w in joined}
            if apart
            else {},
            # a block looks at whole clips, however short the windows of the layer after it
            cross_seen=tuple(
                None if keys.blocks is None else keys.seen(None, order_BQ, position_ids, beams) for keys in context.keys
            ),
            biased_rows=tuple(of_prompt(rows_BT, valid_BK, beams)[:, None] for _, rows_BT in context.row_biases),
        )

    def sets(self, layer: int, key: Tensor, value: Tensor) -> list[TiledKeys] | None:
        """The layer's own keys, then the audio keys that join them, each with its tiles.

        None where the layer's attention runs under one mask; see `whole`.
        """
        if self.row_tiles is None:
            return None
        window, kind = self.windows[layer], self.kinds[layer]
        rows = self.row_tiles[kind]
        if key.shape[2] != self.rows_seen[kind].shape[3]:  # a windowed cache drops old rows
            rows = masked(self.rows_seen[kind][..., -key.shape[2] :])
        joined = [(i, self.key_tiles[i, window]) for i in self.context.joined(layer)]
        audio = [TiledKeys(*self._made(i, layer), tiles, self._biases(i, layer)) for i, tiles in joined if tiles]
        return [TiledKeys(key, value, rows, self._own_biases(layer, key)), *audio]

    def whole(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float | None]:
        """Queries, all keys and values of a layer, which keys each query sees (bool [B, 1, Q, K + A]), and the scale.

        With a bias, queries, keys and values have the extra columns of `with_bias`.
        """
        window = self.windows[layer]
        seen = [self.rows_seen[self.kinds[layer]][..., -key.shape[2] :]]
        keys, values = [key], [value]
        biases = [self._own_biases(layer, key)]
        for i in self.context.joined(layer):
            seen.append(self.keys_seen[i, window])
            k_BGAC, v_BGAC = self._made(i, layer)
            keys.append(k_BGAC.to(key.dtype))
            values.append(v_BGAC.to(key.dtype))
            biases.append(self._biases(i, layer))
        if any(biases):
            query, keys, values, scale = with_bias(query, keys, values, biases, scale)
        return query, torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(seen, dim=3), scale

    def _biases(self, which: int, layer: int) -> tuple[SetBias, ...]:
        """Bias [H or 1, 1] on the scores of a set of audio keys in a layer, if there is one."""
        bias = self.context.keys[which].bias
        return () if bias is None else ((bias[layer][:, None], None),)

    def _own_biases(self, layer: int, key: Tensor) -> tuple[SetBias, ...]:
        """Biases [H or 1, 1] on the scores of audio rows in a layer, each with its rows among the keys [B, 1, K]."""
        return tuple(
            (bias[layer][:, None], rows_B1K[..., -key.shape[2] :])  # a windowed cache drops old rows
            for (bias, _), rows_B1K in zip(self.context.row_biases, self.biased_rows, strict=True)
            if layer in bias
        )

    def ordinary(self, layer: int) -> bool:
        """True if transformers' own mask is right for this layer; it counts windows in rows, not in positions."""
        return (
            not self.context.joined(layer) and self.kinds[layer] == (None, ()) and not _row_biases(self.context, layer)
        )

    def show(self, layer: int, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Call the context's observer with a layer's attention weights, which are computed here for it."""
        observer = self.context.observer
        if observer is None:
            return
        window, rows_BN = self.windows[layer], observer.rows_BN
        joined = self.context.joined(layer)
        keys = [key, *(self._made(i, layer)[0].to(key.dtype) for i in joined)]
        biases = [self._own_biases(layer, key), *(self._biases(i, layer) for i in joined)]
        if any(biases):
            query, keys, _, scale = with_bias(query, keys, [], biases, scale)
        seen = [self.rows_seen[self.kinds[layer]], *(self.keys_seen[i, window] for i in joined)]
        weights_BHNX = attention_weights(
            _rows(query, rows_BN), torch.cat(keys, 2), _rows(torch.cat(seen, 3), rows_BN), scale
        )
        rows_BHNK, *keys_BHNA = weights_BHNX.split([k.shape[2] for k in keys], dim=3)
        observer.attended(layer, AttentionWeights(rows_BHNK, dict(zip(joined, keys_BHNA, strict=True))))

    def _made(self, which: int, layer: int) -> tuple[Tensor, Tensor]:
        keys, llm = self.context.keys[which], self.context.llm
        if keys.built is not None:
            k_BGAC, v_BGAC = keys.built[layer]
        else:
            k_BGAC, v_BGAC = keys.keys_values(layer, llm, self.ropes[which])
        return for_beams(k_BGAC, self.beams), for_beams(v_BGAC, self.beams)

    def crosses(self, layer: int) -> bool:
        """Whether blocks stand before a layer."""
        return bool(self.context.crossing(layer))

    def cross(self, layer: int, x_BQD: Tensor) -> Tensor:
        """The rows that go into a layer, after the blocks that stand before it."""
        for i in self.context.crossing(layer):
            blocks, seen_B1QA = self.context.keys[i].blocks, self.cross_seen[i]
            assert blocks is not None and seen_B1QA is not None
            k_BGAC, v_BGAC = self._made(i, layer)
            if self.context.observer is not None:
                weights_BHQA = blocks[layer].weights(x_BQD, k_BGAC, seen_B1QA)
                self.context.observer.crossed(layer, i, _rows(weights_BHQA, self.context.observer.rows_BN))
            x_BQD = blocks[layer](x_BQD, k_BGAC, v_BGAC, seen_B1QA)
        return x_BQD


def _row_biases(context: AudioContext, layer: int) -> bool:
    return any(layer in bias for bias, _ in context.row_biases)


def _rows(x_BHQX: Tensor, rows_BN: Tensor) -> Tensor:
    """Some of the rows of each item -> [B, H, N, X]."""
    return x_BHQX.gather(2, rows_BN[:, None, :, None].expand(-1, x_BHQX.shape[1], -1, x_BHQX.shape[3]))
