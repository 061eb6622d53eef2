"""Attention of text rows to text and audio, summed during a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pal.backbone.audio_mask import TokenSpans
from pal.backbone.context import AudioContext
from pal.backbone.observers import AttentionWeights
from pal.model import Clips, PalModel
from pal.types import AUDIO, Tokens

PATHWAYS = ("keys", "rows", "text", "cross")
"""Audio K/V (LAL), audio rows of the sequence (PLITS, summaries), text, and cross-attention blocks. The first three sum
to 1; cross-attention sums to 1 by itself if it sees any key."""


@dataclass(frozen=True)
class AnswerAttention:
    """Attention of the N text rows after the last clip of one conversation."""

    tokens: list[int]
    """Token ids of the rows [N]."""
    answer: list[int]
    """Indices of the rows that predict a labelled token."""
    mass_LHNP: Tensor
    """Attention mass on each of `PATHWAYS`, by layer, head and row."""
    visible_LNP: Tensor
    """Number of visible keys of each pathway, in proportion to uniform attention."""
    time_LNX: Tensor | None
    """Attention mass on the first clip in X time bins, mean over heads; of cross-attention if a layer has any. None for
    tokens without times."""
    tokens_audio: list[tuple[str, int, float, float]]
    """Audio tokens of the first clip: (pathway, stream, start, end), times in seconds."""
    token_LA: Tensor
    """Attention mass on each audio token, mean over heads and over the rows that predict the answer."""


def record_attention(model: PalModel, clips: Clips, rows: Sequence[Tokens], bins: int = 40) -> list[AnswerAttention]:
    """Record the attention of labelled conversations in one forward pass; holds the weights of one layer at a time.

    Args:
        model: in evaluation mode.
        clips: as `PalModel.inputs` takes them.
        rows: conversations with at least one clip each, and labels.
        bins: number of time bins of the first clip.
    """
    after = [len(row.ids) - 1 - max(i for i, token in enumerate(row.ids) if token == AUDIO) for row in rows]
    # with padding on the left, the rows after the last clip are the last rows
    inputs = model.inputs(clips, rows, padding_side="left", with_spans=True)
    assert isinstance(inputs.audio_context, AudioContext) and inputs.audio_context.token_spans is not None
    B, T = inputs.position_ids_BT.shape
    N = max(after)
    rows_BN = torch.arange(T - N, T, device=model.device).expand(B, N)
    observer = _Sums(inputs.audio_context, rows_BN, model.llm.n_layers, bins)
    with torch.inference_mode():
        model.llm.hidden(replace(inputs, audio_context=replace(inputs.audio_context, observer=observer)))
    return [observer.of(b, row, count) for b, (row, count) in enumerate(zip(rows, after, strict=True))]


class _Sums:
    """Attention observer that sums weights by pathway, time and audio token."""

    def __init__(self, context: AudioContext, rows_BN: Tensor, layers: int, bins: int) -> None:
        assert context.token_spans is not None
        self.rows_BN = rows_BN
        self.context = context
        self.layers = layers
        sets = [context.token_spans, *(keys.token_spans for keys in context.keys if keys.token_spans is not None)]
        self._sets: list[TokenSpans] = sets
        self._audio = [spans.stream_BX >= 0 for spans in sets]
        first = [spans.clip_BX == 0 for spans in sets]
        ends = [spans.end_BX.where(of_first, -torch.inf).amax(1) for spans, of_first in zip(sets, first, strict=True)]
        end_B = torch.stack(ends).amax(0)
        self.timed = bool(torch.isfinite(end_B).all())
        self._bins = [_overlaps(spans, of_first, end_B, bins) for spans, of_first in zip(sets, first, strict=True)]
        self._first = first
        self._blocks: dict[int, list[Tensor]] = {}
        self._mass: dict[int, Tensor] = {}
        self._visible: dict[int, Tensor] = {}
        self._time: dict[int, Tensor] = {}
        self._token: dict[int, list[Tensor]] = {}

    def attended(self, layer: int, weights: AttentionWeights) -> None:
        """Add the self-attention of a layer."""
        audio_B11K, rows_BHNK = self._audio[0][:, None, None], weights.rows_BHNK
        nothing = rows_BHNK[..., :0]
        blocks = self._blocks.get(layer, [])
        shares = {
            "keys": torch.cat([*weights.keys_BHNA.values(), nothing], -1),
            "rows": rows_BHNK * audio_B11K,
            "text": rows_BHNK * ~audio_B11K,
            "cross": torch.cat([*blocks, nothing], -1) / max(1, len(blocks)),
        }
        self._mass[layer] = torch.stack([shares[pathway].sum(-1) for pathway in PATHWAYS], -1)
        self._visible[layer] = torch.stack([(shares[pathway][:, 0] > 0).sum(-1) for pathway in PATHWAYS], -1)
        if not blocks:
            self._add_tokens(layer, {0: rows_BHNK, **{i + 1: w_BHNA for i, w_BHNA in weights.keys_BHNA.items()}})

    def crossed(self, layer: int, which: int, weights_BHNA: Tensor) -> None:
        """Add the cross-attention of a block, which runs before the layer's self-attention."""
        self._blocks.setdefault(layer, []).append(weights_BHNA)
        self._add_tokens(layer, {which + 1: weights_BHNA})

    def _add_tokens(self, layer: int, by_set: dict[int, Tensor]) -> None:
        """Add weights to the sums over time and over audio tokens; keys of `by_set` are indices of `self._sets`."""
        tokens: list[Tensor] = []
        time: Tensor | None = None
        for i, spans in enumerate(self._sets):
            weights_BHNX = by_set.get(i)
            B, N = self.rows_BN.shape
            mean_BNX = (
                weights_BHNX.mean(1)
                if weights_BHNX is not None
                else torch.zeros(B, N, spans.stream_BX.shape[1], device=self.rows_BN.device)
            )
            tokens.append(mean_BNX)
            if self.timed:
                spread = mean_BNX @ self._bins[i]
                time = spread if time is None else time + spread
        if time is not None:
            before = self._time.get(layer)
            self._time[layer] = time if before is None else before + time
        known = self._token.get(layer)
        self._token[layer] = tokens if known is None else [a + b for a, b in zip(known, tokens, strict=True)]

    def of(self, b: int, row: Tokens, count: int) -> AnswerAttention:
        """Sums of conversation `b`, which has `count` rows after its last clip."""
        assert row.labels is not None
        ids, labels = row.ids[-count:], row.labels[-count:]
        answer = [n - 1 for n, label in enumerate(labels) if label >= 0 and n > 0]
        own = slice(self.rows_BN.shape[1] - count, None)
        mass = torch.stack([self._mass[layer][b, :, own] for layer in range(self.layers)])
        visible = torch.stack([self._visible[layer][b, own] for layer in range(self.layers)])
        time = None
        if self.timed:
            time = torch.stack([self._time[layer][b, own] for layer in range(self.layers)]).cpu()
        entities: list[tuple[str, int, float, float]] = []
        shares: list[Tensor] = []
        for i, spans in enumerate(self._sets):
            chosen = self._first[i][b]
            crossing = i > 0 and self.context.keys[i - 1].blocks is not None
            name = "rows" if i == 0 else "cross" if crossing else "keys"
            facts = zip(spans.stream_BX[b][chosen], spans.start_BX[b][chosen], spans.end_BX[b][chosen], strict=True)
            entities += [(name, int(stream), float(start), float(end)) for stream, start, end in facts]
            at = [n + own.start for n in answer]
            shares.append(
                torch.stack([self._token[layer][i][b, at][:, chosen].mean(0) for layer in range(self.layers)])
            )
        return AnswerAttention(ids, answer, mass.cpu(), visible.cpu(), time, entities, torch.cat(shares, -1).cpu())


def _overlaps(spans: TokenSpans, chosen_BX: Tensor, end_B: Tensor, bins: int) -> Tensor:
    """Fraction of each audio token's time in each bin of the first clip: [B, X, bins]; zeros for other clips."""
    edges = torch.linspace(0, 1, bins + 1, device=end_B.device)
    low_BX1, high_BX1 = spans.start_BX[..., None], spans.end_BX[..., None]
    edges_B1E = (end_B[:, None] * edges)[:, None]
    inside = torch.minimum(high_BX1, edges_B1E[..., 1:]) - torch.maximum(low_BX1, edges_B1E[..., :-1])
    share = inside.clamp(min=0) / (high_BX1 - low_BX1)
    return share.masked_fill(~chosen_BX[..., None], 0.0).nan_to_num(0.0)
