"""The one contract of integrations: audio features and conversations in, `LLMInputs` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pal.backbone.audio_kv import AudioKV, Layout
from pal.backbone.context import AudioContext, KeySource, gather
from pal.backbone.llm import Backbone
from pal.errors import PromptError
from pal.types import AUDIO, IGNORE, AudioFeatures, LLMInputs, Tokens


@dataclass(frozen=True)
class ClipSpans:
    """What an integration makes of some clips: rows of the LLM's sequence, keys and values, or both."""

    lengths: Sequence[int]
    """Real encoder tokens of each clip."""
    layout: Layout
    """Where keys and rows lie in the position ids that a clip reserves."""
    rows_USD: Tensor | None = None
    """Embeddings that run through all layers; None when there are none."""
    keys: KeySource | None = None
    """Makes K/V of all clips, [U, G, A, C] each, when a layer asks."""
    layers: tuple[int, ...] = ()
    """The layers that ask."""
    width_A: int = 0
    """A of `keys`, padding included."""


class ProjectedKeys:
    """K/V made in the layer that asks: P_l(a), then the LLM's own norm and projections."""

    def __init__(self, features: AudioFeatures, projectors: nn.ModuleDict, llm: Backbone) -> None:
        # padding is zeroed, since even a masked key must be finite
        self._x_UAE = features.x_BAE.masked_fill(~features.mask_BA[..., None], 0.0)
        self._projectors = projectors
        self._llm = llm

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [U, G, A, C]."""
        return self._llm.project_kv(layer, self._projectors[str(layer)](self._x_UAE))


class Integration(nn.Module, ABC):
    """Says how audio enters the LLM; everything after it only sees `LLMInputs`.

    Constructed as `cls(config, in_width=E, llm=backbone)`. It must not keep the LLM as a submodule,
    whose weights belong to the model. A concrete integration answers `spans`; text, rows, positions,
    padding, labels and clips shared by several rows are placed here, once for all.
    """

    @abstractmethod
    def spans(self, features: AudioFeatures, llm: Backbone) -> ClipSpans:
        """What goes into the LLM for each clip of `features` [U, A, E]."""

    def forward(
        self,
        audio: AudioFeatures | AudioKV | Sequence[AudioKV] | None,
        rows: Sequence[Tokens],
        llm: Backbone,
        padding_side: Literal["left", "right"] = "right",
    ) -> LLMInputs:
        """Place clips among the text of conversations.

        Args:
            audio: features of the batch's clips, or clips indexed before; None when no row has a clip.
            rows: conversations; their `clips` count into `audio`.
            llm: the backbone, for embeddings and K/V.
            padding_side: where shorter rows are filled up.

        Raises:
            PromptError: a row that is empty or names a clip that is not there.
        """
        return _assemble(self._spans_of(audio, llm), rows, llm, padding_side)

    def _spans_of(self, audio: AudioFeatures | AudioKV | Sequence[AudioKV] | None, llm: Backbone) -> ClipSpans:
        if audio is None:
            return ClipSpans(lengths=(), layout=Layout(seconds_per_token=0.0))
        if isinstance(audio, AudioFeatures):
            return self.spans(audio, llm)
        stored = audio if isinstance(audio, AudioKV) else AudioKV.concat(audio)
        stored = stored.to(llm.device, llm.dtype)
        return ClipSpans(
            lengths=stored.lengths,
            layout=stored.layout,
            rows_USD=stored.rows_BSD if stored.layout.rows else None,
            keys=stored if stored.layers else None,
            layers=stored.layers,
            width_A=stored.k_LBGAC.shape[3],
        )

    @torch.no_grad()
    def index(
        self, features: AudioFeatures, llm: Backbone, digest: str, durations: Sequence[float] | None = None
    ) -> AudioKV:
        """The clips, ready to be asked about many times.

        Args:
            features: of the clips.
            llm: the backbone.
            digest: of the model's weights.
            durations: seconds of each clip; without them, those of its tokens.
        """
        spans = self.spans(features, llm)
        shape = (0, len(spans.lengths), llm.kv_heads, spans.width_A, llm.head_width)
        k_LBGAC = v_LBGAC = features.x_BAE.new_zeros(shape, dtype=llm.dtype)
        if spans.keys is not None:
            made = [spans.keys.keys_values(layer) for layer in spans.layers]
            k_LBGAC, v_LBGAC = (torch.stack(tensors) for tensors in zip(*made, strict=True))
        rows_BSD = spans.rows_USD
        if rows_BSD is None:
            rows_BSD = features.x_BAE.new_zeros((len(spans.lengths), 0, llm.width), dtype=llm.dtype)
        return AudioKV(
            k_LBGAC=k_LBGAC,
            v_LBGAC=v_LBGAC,
            rows_BSD=rows_BSD,
            lengths=tuple(spans.lengths),
            durations=tuple(durations or (count * features.seconds_per_token for count in spans.lengths)),
            layers=spans.layers,
            layout=spans.layout,
            digest=digest,
        )


def mlp(in_width: int, hidden: int, out_width: int) -> nn.Sequential:
    """The projector of every integration: two linear layers with a GELU between."""
    return nn.Sequential(nn.Linear(in_width, hidden), nn.GELU(), nn.Linear(hidden, out_width))


class _Row:
    """One conversation being laid out: where each row's embedding and each key comes from, at which position."""

    def __init__(self) -> None:
        self.table: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.is_audio: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.key_positions: list[Tensor] = []
        self.next = 0

    def add_text(self, table_first: int, count: int, labels: list[int] | None) -> None:
        self.table.append(torch.arange(table_first, table_first + count))
        self.positions.append(torch.arange(self.next, self.next + count))
        self.labels.append(torch.full((count,), IGNORE) if labels is None else torch.tensor(labels, dtype=torch.long))
        self.is_audio.append(torch.zeros(count, dtype=torch.bool))
        self.next += count

    def add_clip(self, clip: int, spans: ClipSpans, rows_first: int) -> None:
        tokens = spans.lengths[clip]
        if spans.rows_USD is not None:
            offsets_S = spans.layout.row_offsets(tokens)
            first = rows_first + clip * spans.rows_USD.shape[1]
            self.table.append(torch.arange(first, first + len(offsets_S)))
            self.positions.append(self.next + offsets_S)
            self.labels.append(torch.full((len(offsets_S),), IGNORE))
            self.is_audio.append(torch.ones(len(offsets_S), dtype=torch.bool))
        if spans.keys is not None:
            self.keys.append(clip * spans.width_A + torch.arange(tokens))
            self.key_positions.append(self.next + spans.layout.key_offsets(tokens))
        # reserved even where nothing stands, so that text after the clip has the ids PLITS would give
        self.next += spans.layout.groups(tokens) * spans.layout.span


def _assemble(spans: ClipSpans, rows: Sequence[Tokens], llm: Backbone, side: Literal["left", "right"]) -> LLMInputs:
    text = [token for row in rows for token in row.ids if token != AUDIO]
    laid = []
    first = 0
    for row in rows:
        laid.append(_lay_out(row, first, len(text), spans))
        first += len(row.ids) - len(row.clips)

    device = llm.device
    table_XD = llm.embed(torch.tensor(text, dtype=torch.long, device=device))
    if spans.rows_USD is not None:
        table_XD = torch.cat((table_XD, spans.rows_USD.flatten(0, 1).to(table_XD.dtype)))
    left = side == "left"
    table_BT, real_BT = _stack([torch.cat(row.table) for row in laid], left, fill=0)
    positions_BT, _ = _stack([torch.cat(row.positions) for row in laid], left, fill=0)
    labels_BT = None
    if any(row.labels is not None for row in rows):
        labels_BT = _stack([torch.cat(row.labels) for row in laid], left, fill=IGNORE)[0].to(device)

    context = None
    if spans.keys is not None and any(row.clips for row in rows):
        nothing = torch.zeros(0, dtype=torch.long)
        tokens_BA, mask_BA = _stack([torch.cat([nothing, *row.keys]) for row in laid], left=False, fill=0)
        key_positions_BA, _ = _stack([torch.cat([nothing, *row.key_positions]) for row in laid], left=False, fill=0)
        audio_rows_BT, _ = _stack([torch.cat(row.is_audio) for row in laid], left, fill=False)
        context = AudioContext(
            llm=llm,
            source=spans.keys,
            layers=spans.layers,
            tokens_BA=None if _one_clip_each(rows, spans) else tokens_BA.to(device),
            positions_BA=key_positions_BA.to(device),
            mask_BA=mask_BA.to(device),
            rows_BT=positions_BT.to(device),
            audio_rows_BT=audio_rows_BT.to(device),
        )
    return LLMInputs(
        inputs_embeds_BTD=gather(table_XD, table_BT.to(device)),
        position_ids_BT=positions_BT.to(device),
        attention_mask_BT=real_BT.long().to(device),
        audio=context,
        labels_BT=labels_BT,
    )


def _lay_out(row: Tokens, text_first: int, rows_first: int, spans: ClipSpans) -> _Row:
    laid = _Row()
    clips = iter(row.clips)
    start = 0
    for end in [*(i for i, token in enumerate(row.ids) if token == AUDIO), len(row.ids)]:
        laid.add_text(text_first, end - start, None if row.labels is None else row.labels[start:end])
        text_first += end - start
        start = end + 1
        if end < len(row.ids):
            clip = next(clips)
            if not 0 <= clip < len(spans.lengths):
                raise PromptError(f"a conversation names clip {clip}, but the batch has {len(spans.lengths)}")
            laid.add_clip(clip, spans, rows_first)
    if not sum(len(part) for part in laid.table):
        raise PromptError("a conversation needs some text")
    return laid


def _one_clip_each(rows: Sequence[Tokens], spans: ClipSpans) -> bool:
    return [row.clips for row in rows] == [[clip] for clip in range(len(spans.lengths))]


def _stack(rows: list[Tensor], left: bool, fill: int | bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one matrix, and a mask that is True where they are."""
    longest = max(len(row) for row in rows)
    matrix = rows[0].new_full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        matrix[i, place] = row
        mask[i, place] = True
    return matrix, mask
