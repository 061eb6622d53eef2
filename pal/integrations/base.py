"""The one contract of integrations: audio features and conversations in, `LLMInputs` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pal.backbone.audio_kv import AudioKV
from pal.backbone.context import AudioContext, AudioKeys, Block, KeySource, Places, gather
from pal.backbone.cost import Added, Step
from pal.backbone.llm import Backbone
from pal.backbone.stream_kv import Layout, StreamKV
from pal.errors import ConfigError, PromptError
from pal.types import AUDIO, IGNORE, AudioFeatures, LLMInputs, Tokens


@dataclass(frozen=True)
class ClipSpans:
    """What a route makes of some clips: rows of the LLM's sequence, keys and values, or both."""

    lengths: Sequence[int]
    """Audio tokens of each clip."""
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
    blocks: Mapping[int, Block] | None = None
    """Where given, they look at the keys before their layer, and the layer itself does not."""


class Integration(nn.Module, ABC):
    """Says how audio enters the LLM; everything after it only sees `LLMInputs`.

    Text, rows, positions, padding, labels and clips shared by several conversations are placed here,
    once for all; its routes say what is placed. It must not keep the LLM as a submodule, whose weights
    belong to the model.
    """

    @abstractmethod
    def routes(self) -> Sequence[Route]:
        """How the tokens of each stream enter, in the streams' order."""

    def forward(
        self,
        audio: AudioFeatures | Sequence[AudioFeatures] | AudioKV | Sequence[AudioKV] | None,
        rows: Sequence[Tokens],
        llm: Backbone,
        padding_side: Literal["left", "right"] = "right",
        located: bool = False,
    ) -> LLMInputs:
        """Place clips among the text of conversations.

        Where there are several streams, a clip's tokens of the first come before those of the second, and so on.

        The row before a text predicts its first token. Behind a clip there may be none that hears all of the clip
        (LAL makes no rows). Where a conversation ends so, or a trained token follows, the last text row is asked
        again: one more row with the same embedding at the clip's last position, where PLITS' last audio row stands.
        It sees what the row it repeats saw, and the clip; no other row sees it, and later text stands where it would
        without it. So generation, scoring and training agree, and no other row's logits depend on what is trained.

        Args:
            audio: the batch's clips as features, one for each stream, or as indexed before; None when no
                row has a clip.
            rows: conversations; their `clips` count into `audio`.
            llm: the backbone, for embeddings and K/V.
            padding_side: where shorter rows are filled up.
            located: also say whose audio each row and key is and when it sounds (`Places`), for what hides some of
                it or watches the attention to it. There is then a context wherever there is a clip.

        Raises:
            PromptError: a row that is empty, names a clip that is not there, or has a clip that makes no rows and
                no text to ask about it.
        """
        return _assemble(self._spans_of(audio, llm), rows, llm, padding_side, located)

    def _spans_of(
        self, audio: AudioFeatures | Sequence[AudioFeatures] | AudioKV | Sequence[AudioKV] | None, llm: Backbone
    ) -> list[ClipSpans]:
        if audio is None:
            return []
        given = [audio] if isinstance(audio, AudioFeatures | AudioKV) else list(audio)
        stored = [clip for clip in given if isinstance(clip, AudioKV)]
        if stored:
            moved = AudioKV.concat(stored).to(llm.device, llm.dtype)
            return [route.stored(stream) for route, stream in zip(self.routes(), moved.streams, strict=True)]
        features = [stream for stream in given if isinstance(stream, AudioFeatures)]
        return [route.spans(stream, llm) for route, stream in zip(self.routes(), features, strict=True)]

    @torch.no_grad()
    def index(
        self,
        audio: AudioFeatures | Sequence[AudioFeatures],
        llm: Backbone,
        digest: str,
        durations: Sequence[float] | None = None,
    ) -> AudioKV:
        """The clips, ready to be asked about many times.

        Args:
            audio: features of the clips, one for each stream.
            llm: the backbone.
            digest: of the model's weights.
            durations: seconds of each clip; without them, those of the first stream's tokens.
        """
        features = [audio] if isinstance(audio, AudioFeatures) else list(audio)
        if durations is None:
            durations = [count * features[0].seconds_per_token for count in features[0].lengths]
        streams = [_stored(spans, llm) for spans in self._spans_of(features, llm)]
        return AudioKV(streams=tuple(streams), durations=tuple(durations), digest=digest)


class Route(Integration):
    """How the tokens of one stream enter the LLM; alone it is the integration of a model with one stream.

    Constructed as `cls(config, in_width=E, llm=backbone)`.
    """

    @abstractmethod
    def spans(self, features: AudioFeatures, llm: Backbone) -> ClipSpans:
        """What goes into the LLM for each clip of `features` [U, A, E]."""

    def routes(self) -> Sequence[Route]:
        """Itself."""
        return (self,)

    def blocks(self) -> Mapping[int, Block] | None:
        """Networks of its own before some of the LLM's layers, which look at the keys in the layers' place."""
        return None

    def cost(self, step: Step, tokens: int, llm: Backbone) -> Added:
        """What `spans` of clips of so many tokens adds to a training step, in closed form; for `pal plan`.

        Raises:
            ConfigError: the integration does not say.
        """
        raise ConfigError(f"{type(self).__name__} does not say what it costs; give it a method `cost`")

    def fold(self, llm: Backbone) -> int:
        """Put together for inference what can be done in one product; in how many layers that was.

        It is used as long as weights and modules are what they were; training never uses it.
        """
        return 0

    def stored(self, stream: StreamKV) -> ClipSpans:
        """What `spans` gave when the clips were indexed."""
        return ClipSpans(
            lengths=stream.lengths,
            layout=stream.layout,
            rows_USD=stream.rows_BSD if stream.layout.rows else None,
            keys=stream if stream.layers else None,
            layers=stream.layers,
            width_A=stream.k_LBGAC.shape[3],
            blocks=self.blocks(),
        )


def _stored(spans: ClipSpans, llm: Backbone) -> StreamKV:
    """All K/V and rows, made now."""
    clips = len(spans.lengths)
    empty = torch.zeros(0, clips, llm.kv_heads, spans.width_A, llm.head_width, device=llm.device, dtype=llm.dtype)
    k_LBGAC = v_LBGAC = empty
    if spans.keys is not None:
        made = [spans.keys.keys_values(layer) for layer in spans.layers]
        k_LBGAC, v_LBGAC = (torch.stack(tensors) for tensors in zip(*made, strict=True))
    rows_BSD = spans.rows_USD
    if rows_BSD is None:
        rows_BSD = torch.zeros(clips, 0, llm.width, device=llm.device, dtype=llm.dtype)
    return StreamKV(
        k_LBGAC=k_LBGAC,
        v_LBGAC=v_LBGAC,
        rows_BSD=rows_BSD,
        lengths=tuple(spans.lengths),
        layers=spans.layers,
        layout=spans.layout,
    )


class _Row:
    """One conversation being laid out: where each row's embedding and each key comes from, at which position."""

    def __init__(self, streams: int, located: bool) -> None:
        self.located = located
        self.table: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.is_audio: list[Tensor] = []
        self.asks: list[Tensor] = []
        self.last_text: Tensor | None = None
        self.row_places = [_no_places(0)]
        nothing = torch.zeros(0, dtype=torch.long)
        self.keys = [[nothing] for _ in range(streams)]
        self.key_positions = [[nothing] for _ in range(streams)]
        self.key_turns = [[nothing] for _ in range(streams)]
        self.key_places = [[_no_places(0)] for _ in range(streams)]
        self.next = 0

    def add_text(self, table_first: int, count: int, labels: list[int] | None) -> None:
        self.table.append(torch.arange(table_first, table_first + count))
        self.positions.append(torch.arange(self.next, self.next + count))
        self.labels.append(torch.full((count,), IGNORE) if labels is None else torch.tensor(labels, dtype=torch.long))
        self.is_audio.append(torch.zeros(count, dtype=torch.bool))
        self.asks.append(torch.zeros(count, dtype=torch.bool))
        if self.located:
            self.row_places.append(_no_places(count))
        if count:
            self.last_text = self.table[-1][-1:]
        self.next += count

    def add_clip(self, clip: int, number: int, stream: int, spans: ClipSpans, rows_first: int) -> None:
        """Clip `clip` of the batch, as number `number` of the conversation."""
        tokens = spans.lengths[clip]
        if spans.rows_USD is not None:
            offsets_S = spans.layout.row_offsets(tokens)
            first = rows_first + clip * spans.rows_USD.shape[1]
            self.table.append(torch.arange(first, first + len(offsets_S)))
            self.positions.append(self.next + offsets_S)
            self.labels.append(torch.full((len(offsets_S),), IGNORE))
            self.is_audio.append(torch.ones(len(offsets_S), dtype=torch.bool))
            self.asks.append(torch.zeros(len(offsets_S), dtype=torch.bool))
            if self.located:
                self.row_places.append(_places(stream, number, spans.layout.row_times(tokens)))
        if spans.keys is not None:
            self.keys[stream].append(clip * spans.width_A + torch.arange(tokens))
            self.key_positions[stream].append(self.next + spans.layout.key_offsets(tokens))
            self.key_turns[stream].append(spans.layout.key_turns(tokens, self.next))
            if self.located:
                self.key_places[stream].append(_places(stream, number, spans.layout.key_times(tokens)))
        # reserved even where nothing stands, so that text after the clip has the ids PLITS would give
        self.next += spans.layout.groups(tokens) * spans.layout.span

    def ask_again(self) -> None:
        """Where the last row does not hear all before it: a row that does, at the last position reserved so far."""
        table_T, positions_T = torch.cat(self.table), torch.cat(self.positions)
        heard_X = torch.cat([positions_A for parts in self.key_positions for positions_A in parts])
        if not len(table_T):
            return  # nothing was said that could be asked
        if int(positions_T[-1]) == self.next - 1 and not bool((heard_X > positions_T[-1]).any()):
            return
        self.table.append(table_T[-1:] if self.last_text is None else self.last_text)
        self.positions.append(torch.tensor([self.next - 1]))
        self.labels.append(torch.tensor([IGNORE]))
        self.is_audio.append(torch.ones(1, dtype=torch.bool))
        self.asks.append(torch.ones(1, dtype=torch.bool))
        if self.located:
            self.row_places.append(_no_places(1))


def _assemble(
    streams: Sequence[ClipSpans], rows: Sequence[Tokens], llm: Backbone, side: Literal["left", "right"], located: bool
) -> LLMInputs:
    text = [token for row in rows for token in row.ids if token != AUDIO]
    # one table of embeddings: the text's, then each stream's rows
    rows_first = [len(text)]
    for spans in streams:
        rows_first.append(rows_first[-1] + (0 if spans.rows_USD is None else spans.rows_USD[..., 0].numel()))
    laid = []
    first = 0
    for row in rows:
        laid.append(_lay_out(row, first, rows_first, streams, located))
        first += len(row.ids) - len(row.clips)

    device = llm.device
    table_XD = llm.embed(torch.tensor(text, dtype=torch.long, device=device))
    audio_rows = [spans.rows_USD.flatten(0, 1) for spans in streams if spans.rows_USD is not None]
    if audio_rows:
        table_XD = torch.cat((table_XD, *(x_XD.to(table_XD.dtype) for x_XD in audio_rows)))
    left = side == "left"
    table_BT, real_BT = _stack([torch.cat(row.table) for row in laid], left, fill=0)
    positions_BT, _ = _stack([torch.cat(row.positions) for row in laid], left, fill=0)
    labels_BT = None
    if any(row.labels is not None for row in rows):
        labels_BT = _stack([torch.cat(row.labels) for row in laid], left, fill=IGNORE)[0].to(device)

    context = None
    if any(spans.keys is not None or located for spans in streams) and any(row.clips for row in rows):
        audio_rows_BT, _ = _stack([torch.cat(row.is_audio) for row in laid], left, fill=False)
        asks_BT, _ = _stack([torch.cat(row.asks) for row in laid], left, fill=False)
        context = AudioContext(
            llm=llm,
            keys=tuple(
                _audio_keys(spans, spans.keys, i, rows, laid, device, located)
                for i, spans in enumerate(streams)
                if spans.keys is not None
            ),
            rows_BT=positions_BT.to(device),
            audio_rows_BT=audio_rows_BT.to(device),
            places=_stacked_places([row.row_places for row in laid], left, device) if located else None,
        )
        if bool(asks_BT.any()):
            context = context.asking(asks_BT.to(device))
    return LLMInputs(
        inputs_embeds_BTD=gather(table_XD, table_BT.to(device)),
        position_ids_BT=positions_BT.to(device),
        attention_mask_BT=real_BT.long().to(device),
        audio=context,
        labels_BT=labels_BT,
    )


def _audio_keys(
    spans: ClipSpans,
    source: KeySource,
    stream: int,
    rows: Sequence[Tokens],
    laid: Sequence[_Row],
    device: torch.device,
    located: bool,
) -> AudioKeys:
    def stacked(lists: Sequence[list[Tensor]]) -> tuple[Tensor, Tensor]:
        matrix, mask = _stack([torch.cat(parts) for parts in lists], left=False, fill=0)
        return matrix.to(device), mask.to(device)

    tokens_BA, mask_BA = stacked([row.keys[stream] for row in laid])
    positions_BA, _ = stacked([row.key_positions[stream] for row in laid])
    turns_BA, _ = stacked([row.key_turns[stream] for row in laid])
    return AudioKeys(
        source=source,
        layers=spans.layers,
        tokens_BA=None if _one_clip_each(rows, spans) else tokens_BA,
        positions_BA=positions_BA,
        turns_BA=turns_BA,
        mask_BA=mask_BA,
        blocks=spans.blocks,
        places=_stacked_places([row.key_places[stream] for row in laid], False, device) if located else None,
    )


def _places(stream: int, clip: int, times_X2: Tensor) -> Tensor:
    """The columns of `Places` for one clip's rows or keys: [X, 4]."""
    about_X2 = torch.tensor([float(stream), float(clip)]).expand(len(times_X2), 2)
    return torch.cat((about_X2, times_X2), dim=1)


def _no_places(count: int) -> Tensor:
    return torch.tensor([-1.0, -1.0, torch.nan, torch.nan]).expand(count, 4)


def _stacked_places(rows: Sequence[list[Tensor]], left: bool, device: torch.device) -> Places:
    columns = [[torch.cat(parts)[:, column] for parts in rows] for column in range(4)]
    stream, clip = (_stack(column, left, fill=-1)[0].long() for column in columns[:2])
    start, end = (_stack(column, left, fill=torch.nan)[0] for column in columns[2:])
    return Places(stream.to(device), clip.to(device), start.to(device), end.to(device))


def _lay_out(
    row: Tokens, text_first: int, rows_first: Sequence[int], streams: Sequence[ClipSpans], located: bool
) -> _Row:
    laid = _Row(len(streams), located)
    known = len(streams[0].lengths) if streams else 0
    clips = enumerate(row.clips)
    start = 0
    for end in [*(i for i, token in enumerate(row.ids) if token == AUDIO), len(row.ids)]:
        if start and (end > start or end == len(row.ids)) and row.asks_before(start):
            laid.ask_again()
        laid.add_text(text_first, end - start, None if row.labels is None else row.labels[start:end])
        text_first += end - start
        start = end + 1
        if end < len(row.ids):
            number, clip = next(clips)
            if not 0 <= clip < known:
                raise PromptError(f"a conversation names clip {clip}, but the batch has {known}")
            for stream, spans in enumerate(streams):
                laid.add_clip(clip, number, stream, spans, rows_first[stream])
    if not sum(len(part) for part in laid.table):
        about = " to ask about its clips; put some before or after them" if row.clips else ""
        raise PromptError(f"a conversation needs some text{about}")
    return laid


def _one_clip_each(rows: Sequence[Tokens], spans: ClipSpans) -> bool:
    return [row.clips for row in rows] == [[clip] for clip in range(len(spans.lengths))]


def _stack(rows: list[Tensor], left: bool, fill: float) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one matrix, and a mask that is True where they are."""
    longest = max(len(row) for row in rows)
    matrix = rows[0].new_full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        matrix[i, place] = row
        mask[i, place] = True
    return matrix, mask
