"""Layout of a batch: positions, labels and sources of all rows and keys of each conversation, computed on the host.

Nothing here uses a device, so threads that load data can do it while the device is busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pal.backbone.segments import Conversation
from pal.backbone.stream_kv import Layout
from pal.errors import PromptError
from pal.types import AUDIO, IGNORE, Tokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StreamLayout:
    """Lengths of the clips of one stream, and what they become: rows, keys, or both."""

    lengths: Sequence[int]
    """Audio tokens of each clip."""
    layout: Layout
    """How keys and rows of a clip lie in the order of the conversation, and their position ids."""
    rows: bool
    """True if the stream has audio rows."""
    keys: bool
    """True if the stream has keys and values."""


@dataclass(frozen=True)
class KeyLayout:
    """The audio keys of one stream in one conversation, each [A]."""

    clips: Ints
    """Index of the clip in the batch."""
    tokens: Ints
    """Index of the token in its clip."""
    order: Ints
    """Place of each key in the conversation; a row sees the keys at or before its own place."""
    positions: Ints
    """Position of each key in sliding windows."""
    rope_positions: Ints
    """Positions that RoPE rotates the keys by."""
    spans: Floats | None
    """[A, 4]: stream, number of the clip in the conversation, start and end in seconds; None if not asked for."""

    def of_tokens(self, kept: Sequence[Ints]) -> KeyLayout:
        """Only the keys of some tokens of each clip, which are then numbered from 0."""
        number_UA = np.full((len(kept), max((int(one.max()) for one in kept), default=0) + 1), -1)
        for clip, tokens in enumerate(kept):
            number_UA[clip, tokens] = np.arange(len(tokens))
        inside = self.tokens < number_UA.shape[1]
        number_A = np.where(inside, number_UA[self.clips, np.where(inside, self.tokens, 0)], -1)
        chosen = number_A >= 0
        columns = {name: getattr(self, name)[chosen] for name in _KEY_COLUMNS if name != "tokens"}
        spans = None if self.spans is None else self.spans[chosen]
        return KeyLayout(**columns, tokens=number_A[chosen], spans=spans)


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of one conversation, each [T], and its audio keys."""

    sources: Ints
    """Number of the row's stream; -1 for text."""
    clips: Ints
    """Index of the row's clip in the batch; -1 for text."""
    numbers: Ints
    """Index of an audio row in its clip; index of a text row among the text tokens of all conversations."""
    order: Ints
    """Place of each row in the conversation, of which a clip takes one for each key and row."""
    positions: Ints
    """Position ids, for RoPE and sliding windows."""
    labels: Ints
    repeats: NDArray[np.bool_]
    """True for a repeated row: the last text row again, behind clips."""
    spans: Floats | None
    """[T, 4], as in `KeyLayout`."""
    keys: tuple[KeyLayout, ...]
    """Audio keys of each stream."""
    shared: int = 0
    """Number of its first rows that an earlier conversation of the batch has, and all audio keys with them."""
    base: int = -1
    """Number of that conversation."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def is_text(self) -> NDArray[np.bool_]:
        """True for text rows, repeated ones excluded."""
        return (self.sources < 0) & ~self.repeats

    def conversation(self) -> Conversation:
        """The part of the layout that attention depends on."""
        return Conversation(
            self.positions,
            self.is_text,
            self.repeats,
            tuple(one.positions for one in self.keys),
            self.order,
            tuple(one.order for one in self.keys),
            self.sources,
            self.shared,
            self.base,
        )

    @property
    def own(self) -> SequenceLayout:
        """The rows and keys that are not shared."""
        if not self.shared:
            return self
        rows: dict[str, Any] = {name: getattr(self, name)[self.shared :] for name in (*_ROW_COLUMNS, "repeats")}
        keys = tuple(
            KeyLayout(**{name: getattr(one, name)[:0] for name in _KEY_COLUMNS}, spans=None) for one in self.keys
        )
        return SequenceLayout(**rows, spans=None, keys=keys)


@dataclass
class _GrowingColumns:
    """Named columns, to which arrays are appended."""

    parts: dict[str, list[NDArray[np.generic]]] = field(default_factory=dict)

    def add(self, **columns: NDArray[np.generic] | None) -> None:
        for name, column in columns.items():
            if column is not None:
                self.parts.setdefault(name, []).append(column)

    def get(self, name: str, empty: NDArray[np.generic]) -> NDArray[np.generic]:
        """One column; `empty` is an array of length 0 with its dtype and width."""
        return np.concatenate([empty, *self.parts.get(name, [])])


_NO_ROWS = np.zeros(0, np.int64)
_NO_SPANS = np.zeros((0, 4))


class _SequenceBuilder:
    """Builder of one conversation's layout."""

    def __init__(self, streams: Sequence[StreamLayout], with_spans: bool) -> None:
        self.streams = streams
        self.with_spans = with_spans
        self.rows = _GrowingColumns()
        self.keys = [_GrowingColumns() for _ in streams]
        self.count = 0
        self.next = 0
        """Position of the next row."""
        self.place = 0
        """Place of the next row."""
        self.last = -1
        """Place of the last row."""
        self.beside = False
        """The last row is of a clip that reserved no position ids."""
        self.last_row: tuple[int, int, int] | None = None
        self.last_text: int | None = None

    def _add(
        self, source: int, clip: int, numbers: Ints, order: Ints, positions: Ints, labels: Ints, spans: Floats | None
    ) -> None:
        count = len(numbers)
        self.rows.add(
            sources=np.full(count, source),
            clips=np.full(count, clip),
            numbers=numbers,
            order=order,
            positions=positions,
            labels=labels,
            repeats=np.zeros(count, bool),
            spans=spans,
        )
        self.count += count
        if count:
            self.last, self.beside = int(order[-1]), source >= 0 and self.streams[source].layout.beside
            self.last_row = (source, clip, int(numbers[-1]))

    def add_text(self, first: int, count: int, labels: list[int] | None) -> None:
        numbers = np.arange(first, first + count)
        row_labels = np.full(count, IGNORE) if labels is None else np.asarray(labels, np.int64)
        order, positions = (np.arange(start, start + count) for start in (self.place, self.next))
        self._add(-1, -1, numbers, order, positions, row_labels, self._no_spans(count))
        if count:
            self.last_text = first + count - 1
        self.place += count
        self.next += count

    def add_clip(self, clip: int, number: int, stream: int) -> None:
        """Add clip `clip` of the batch, which is number `number` in the conversation."""
        stream_layout = self.streams[stream]
        layout, tokens = stream_layout.layout, stream_layout.lengths[clip]
        if stream_layout.rows:
            order, positions = self.place + layout.row_offsets(tokens), layout.row_positions(tokens, self.next)
            spans = self._spans(stream, number, layout.row_times(tokens))
            count = len(order)
            self._add(stream, clip, np.arange(count), order, positions, np.full(count, IGNORE), spans)
        if stream_layout.keys:
            self.keys[stream].add(
                clips=np.full(tokens, clip),
                tokens=np.arange(tokens),
                order=self.place + layout.key_offsets(tokens),
                positions=layout.key_positions(tokens, self.next),
                rope_positions=layout.key_rope_positions(tokens, self.next),
                spans=self._spans(stream, number, layout.key_times(tokens)),
            )
        # reserved even without rows or keys, so that text after the clip has the same position ids as in PLITS
        self.place += layout.groups(tokens) * layout.places
        self.next += layout.reserved(tokens)

    def repeat_last_row(self) -> None:
        """Repeat the last text row at the last position so far, unless the last row sees all audio so far.

        It is also repeated if the last row is a clip's, but the clip reserved no position ids and there is text.
        """
        if self.last_row is None:
            return  # there is no row to repeat
        if self.last == self.place - 1 and (not self.beside or self.last_text is None):
            return
        source, clip, number = self.last_row if self.last_text is None else (-1, -1, self.last_text)
        self.rows.add(
            sources=np.array([source]),
            clips=np.array([clip]),
            numbers=np.array([number]),
            order=np.array([self.place - 1]),
            positions=np.array([self.next - 1]),
            labels=np.array([IGNORE]),
            repeats=np.ones(1, bool),
            spans=self._no_spans(1),
        )
        self.count += 1
        self.last, self.last_row, self.beside = self.place - 1, (source, clip, number), False

    def _spans(self, stream: int, clip: int, times_X2: Floats) -> Floats | None:
        if not self.with_spans:
            return None
        return np.concatenate((np.tile([float(stream), float(clip)], (len(times_X2), 1)), times_X2), axis=1)

    def _no_spans(self, count: int) -> Floats | None:
        return np.tile([-1.0, -1.0, np.nan, np.nan], (count, 1)) if self.with_spans else None

    def build(self) -> SequenceLayout:
        """The finished layout."""
        rows: dict[str, Any] = {name: self.rows.get(name, _NO_ROWS).astype(np.int64) for name in _ROW_COLUMNS}
        keys = []
        for parts in self.keys:
            columns = {name: parts.get(name, _NO_ROWS).astype(np.int64) for name in _KEY_COLUMNS}
            keys.append(KeyLayout(**columns, spans=_floats(parts, self.with_spans)))
        repeats = self.rows.get("repeats", np.zeros(0, bool)).astype(bool)
        return SequenceLayout(**rows, repeats=repeats, spans=_floats(self.rows, self.with_spans), keys=tuple(keys))


_ROW_COLUMNS = ("sources", "clips", "numbers", "order", "positions", "labels")
_KEY_COLUMNS = ("clips", "tokens", "order", "positions", "rope_positions")


def _floats(parts: _GrowingColumns, with_spans: bool) -> Floats | None:
    return parts.get("spans", _NO_SPANS).astype(np.float64) if with_spans else None


def lay_out(
    conversations: Sequence[Tokens], streams: Sequence[StreamLayout], with_spans: bool = False
) -> list[SequenceLayout]:
    """Lay out conversations.

    Args:
        conversations: token ids, with -1 for each clip.
        streams: lengths of the clips of each stream, and what they become.
        with_spans: add stream, clip and time span of each row and key.

    Raises:
        PromptError: a conversation that is empty, names an unknown clip, or has no text beside a clip without audio
            rows.
    """
    layouts = []
    first = 0
    for one in conversations:
        layouts.append(_lay_out_one(one, first, streams, with_spans))
        first += len(one.ids) - len(one.clips)
    return layouts


def share_prefixes(layouts: Sequence[SequenceLayout], conversations: Sequence[Tokens]) -> list[SequenceLayout]:
    """The layouts, in which neighbours that begin alike, up to the end of their last clip, share rows and keys.

    A conversation shares nothing if its last clip is at its end, or a row is repeated.
    """
    found: list[SequenceLayout] = []
    base, begins = -1, None
    for number, (layout, conversation) in enumerate(zip(layouts, conversations, strict=True)):
        end = len(conversation.ids) - conversation.ids[::-1].index(AUDIO) if conversation.clips else 0
        text = len(conversation.ids) - end
        mine = (conversation.ids[:end], conversation.clips)
        whole = not text or not end or bool(layout.repeats.any())
        if not whole and mine == begins:
            found.append(replace(layout, shared=len(layout) - text, base=base))
            continue
        base, begins = number, None if whole else mine
        found.append(layout)
    return found


def _lay_out_one(
    conversation: Tokens, text_first: int, streams: Sequence[StreamLayout], with_spans: bool
) -> SequenceLayout:
    builder = _SequenceBuilder(streams, with_spans)
    known = len(streams[0].lengths) if streams else 0
    clips, ids, labels = enumerate(conversation.clips), conversation.ids, conversation.labels
    start = 0
    for end in [*(i for i, token in enumerate(ids) if token == AUDIO), len(ids)]:
        if start and (end > start or end == len(ids)) and conversation.predicts_at(start):
            builder.repeat_last_row()
        builder.add_text(text_first, end - start, None if labels is None else labels[start:end])
        text_first += end - start
        start = end + 1
        if end < len(ids):
            number, clip = next(clips)
            if not 0 <= clip < known:
                raise PromptError(f"a conversation names clip {clip}, but the batch has {known}")
            for stream in range(len(streams)):
                builder.add_clip(clip, number, stream)
    if not builder.count:
        purpose = " to ask about its clips; put some before or after them" if conversation.clips else ""
        raise PromptError(f"a conversation needs some text{purpose}")
    return builder.build()
