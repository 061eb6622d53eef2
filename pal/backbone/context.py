"""What the attention function is told about audio: `AudioContext` for a batch, `AudioView` for one forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pal.backbone.kernels import takes_apart
from pal.backbone.merged import Keys, Piece, masked, prefixes
from pal.errors import ConfigError, PalError

if TYPE_CHECKING:
    from pal.backbone.packed import DeviceSegments

Rope = dict[str, tuple[Tensor, Tensor]]
"""Layer type -> cos and sin, each [B, A, C]."""
Kind = tuple[int | None, tuple[int, ...]]
"""Layers of one kind see the same rows; see `AudioContext.rows_kind`."""
EDGE = 1e-4
"""Seconds by which a token must reach into a span: more than round-off, less than any token."""


class Block(Protocol):
    """A network between two layers, through which rows look at keys."""

    def __call__(self, x_BQD: Tensor, k_BGAC: Tensor, v_BGAC: Tensor, seen_B1QA: Tensor | None) -> Tensor:
        """Rows, K and V, and which keys each row sees, None where all -> rows [B, Q, D]."""
        ...

    def weights(self, x_BQD: Tensor, k_BGAC: Tensor, seen_B1QA: Tensor) -> Tensor:
        """How each row's attention is shared among the keys: [B, H, Q, A], all 0 where it sees none."""
        ...


class PackedBlock(Block, Protocol):
    """A `Block` that also takes packed rows."""

    def packed(self, x_1ND: Tensor, k_IGC: Tensor, v_IGC: Tensor, segments: DeviceSegments, hears_N1: Tensor) -> Tensor:
        """Rows, all K and V, which keys the rows see, and which rows see any -> rows [1, N, D]."""
        ...


class Geometry(Protocol):
    """What attention to audio must know of an LLM (`Backbone`): where its positions turn keys, how far back it sees."""

    layer_types: tuple[str, ...]
    """Per layer, the key of its rotary embedding in `rope`."""
    windows: tuple[int | None, ...]
    """Per layer, how many positions back a query sees, itself included; None means all."""

    head_width: int
    """C."""
    dropout: float
    """Of attention probabilities, while it trains."""
    recomputes_audio: bool
    """Whether what makes a layer's audio K/V is dropped and made again in the backward pass."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    def rope(self, positions_BA: Tensor) -> Rope:
        """Cos and sin of the LLM's rotary embedding at positions."""
        ...

    def check_ears(self) -> None:
        """Raise where the LLM's attention cannot see audio."""
        ...


class KeySource(Protocol):
    """Where a layer's audio keys and values come from: projected on the spot, or stored ahead."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of all clips, each [U, G, A, C], U the number of clips."""
        ...


@dataclass(frozen=True)
class Hide:
    """Audio that no query sees. Positions, and what is computed of the audio itself, stay as they are.

    An audio row still sees itself: where a prompt ends in one, as PLITS' does in a clip, it predicts the first token.
    What is given narrows it down; without anything it is all audio.
    """

    pathway: Literal["keys", "rows"] | None = None
    """Audio K/V (LAL), or audio rows of the sequence (PLITS, summaries)."""
    stream: int | None = None
    """Number of a connector's output, counted from 0; a model with one encoder has one."""
    layers: Collection[int] | None = None
    """Layers whose queries do not see it."""
    seconds: tuple[float, float] | None = None
    """Tokens that sound at any time between these two, counted from the start of their clip."""
    share: tuple[float, float] | None = None
    """The same in shares of their clip, from 0 to 1, so that clips of any length lose as much."""

    @property
    def timed(self) -> bool:
        """Whether it asks when tokens sound."""
        return self.seconds is not None or self.share is not None

    @property
    def placed(self) -> bool:
        """Whether it asks what each token stands for."""
        return self.stream is not None or self.timed


@dataclass(frozen=True)
class Places:
    """What rows of the sequence, or keys, stand for; all [B, X]."""

    stream_BX: Tensor
    """Number of the stream they are made from; -1 for text and padding."""
    clip_BX: Tensor
    """Number of the clip within its conversation; -1 for text and padding."""
    start_BX: Tensor
    """Seconds from the start of the clip; NaN where tokens stand for no time of their own, and for text."""
    end_BX: Tensor

    def chosen(self, what: Hide) -> Tensor:
        """Those of the stream and the time that `what` names: bool [B, X].

        Raises:
            ConfigError: a time, of tokens that have none.
        """
        chosen_BX = self.stream_BX >= 0
        if what.stream is not None:
            chosen_BX = self.stream_BX == what.stream
        if what.timed and bool(self.start_BX[chosen_BX].isnan().any()):
            raise ConfigError("a span of time cannot be hidden here: the connector's tokens have no time of their own")
        if what.seconds is not None:
            start, end = what.seconds
            chosen_BX = chosen_BX & (self.start_BX < end - EDGE) & (self.end_BX > start + EDGE)
        if what.share is not None:
            lengths_BX = self.lengths()
            start_BX, end_BX = (share * lengths_BX for share in what.share)
            chosen_BX = chosen_BX & (self.start_BX < end_BX - EDGE) & (self.end_BX > start_BX + EDGE)
        return chosen_BX

    def lengths(self) -> Tensor:
        """Seconds of the clip that each is from: where its last token ends; [B, X]."""
        clips = int(self.clip_BX.max()) + 2 if self.clip_BX.numel() else 1
        ends_BY = self.end_BX.new_zeros(len(self.end_BX), clips)
        ends_BY = ends_BY.scatter_reduce(1, self.clip_BX + 1, self.end_BX.nan_to_num(), "amax")
        return ends_BY.gather(1, self.clip_BX + 1)

    def ordered(self, order_BT: Tensor) -> Places:
        """The same in another order ([B, T] of indices)."""
        return Places(*(getattr(self, part.name).gather(1, order_BT) for part in fields(self)))


@dataclass(frozen=True)
class Weights:
    """How the attention of some rows of one layer is shared; over `rows` and all `keys` together it sums to 1."""

    rows_BHNK: Tensor
    """Over the rows of the sequence, causal."""
    keys_BHNA: Mapping[int, Tensor]
    """Over each of the context's `keys` that joins the layer, by its number."""


class Watch(Protocol):
    """Is shown the attention of every layer in turn, and keeps of it what it likes; nothing is stored for it."""

    rows_BN: Tensor
    """Which rows of the sequence it is shown: their numbers, N the same for all."""

    def attended(self, layer: int, weights: Weights) -> None:
        """The LLM's own attention in a layer."""
        ...

    def crossed(self, layer: int, which: int, weights_BHNA: Tensor) -> None:
        """Attention of a block before a layer to number `which` of the context's keys alone; sums to 1 or to 0."""
        ...


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
    turns_BA: Tensor
    """Positions that RoPE turns the keys by: the same, but for keys that reserve no positions of their own."""
    mask_BA: Tensor
    """True where a key is real."""
    blocks: Mapping[int, Block] | None = None
    """What stands before a layer and looks at them there; None where the layer's own attention does."""
    built: dict[int, tuple[Tensor, Tensor]] | None = None
    """K after RoPE and V per layer, each [B, G, A, C], when they were made ahead."""
    places: Places | None = None
    """What each key stands for, where that was asked for."""
    gaps: bool = False
    """Whether keys between real ones may be masked."""

    def without(self, what: Hide) -> tuple[AudioKeys, ...]:
        """The same keys as far as they are still seen: none, one set, or one for each of two groups of layers."""
        hidden_BA = self.mask_BA
        if what.placed:
            assert self.places is not None, "made without `located`"
            hidden_BA = self.places.chosen(what) & self.mask_BA
        if not bool(hidden_BA.any()):
            return (self,)
        layers = self.layers if what.layers is None else what.layers
        parts = [replace(self, layers=tuple(layer for layer in self.layers if layer not in layers))]
        if not torch.equal(hidden_BA, self.mask_BA):
            inside = tuple(layer for layer in self.layers if layer in layers)
            parts.append(replace(self, layers=inside, mask_BA=self.mask_BA & ~hidden_BA, gaps=True))
        return tuple(part for part in parts if part.layers)

    def keys_values(self, layer: int, llm: Geometry, rope: Rope) -> tuple[Tensor, Tensor]:
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

    def prebuilt(self, llm: Geometry) -> AudioKeys:
        """The same with every layer's K/V made now."""
        if self.built is not None:
            return self
        rope = llm.rope(self.turns_BA)
        return replace(self, built={layer: self.keys_values(layer, llm, rope) for layer in self.layers})

    def pieces(
        self, window: int | None, positions_BQ: Tensor, beams: int, ahead_BQ: Tensor | None = None
    ) -> tuple[Piece, ...]:
        """The same as `seen`, as rectangles."""
        if window is not None or self.gaps:
            return masked(self.seen(window, positions_BQ, beams, ahead_BQ))
        far = torch.iinfo(self.positions_BA.dtype).max
        positions_BA = _expand(self.positions_BA.masked_fill(~self.mask_BA, far), beams)
        reach_BQ = positions_BQ if ahead_BQ is None else positions_BQ + ahead_BQ
        counts_BQ = torch.searchsorted(positions_BA, reach_BQ.contiguous(), right=True)
        # padding, whose position is 0, may see what it likes
        return prefixes(counts_BQ.cummax(1).values.tolist(), counts_BQ.device)

    def seen(self, window: int | None, positions_BQ: Tensor, beams: int, ahead_BQ: Tensor | None = None) -> Tensor:
        """Which keys each query sees, bool [B, 1, Q, A]: the real ones at or before its position.

        Those of `ahead_BQ` also see keys one position later, where the row stands that they predict.
        """
        distance_BQA = positions_BQ[:, :, None] - _expand(self.positions_BA, beams)[:, None, :]
        reach_BQA = distance_BQA if ahead_BQ is None else distance_BQA + ahead_BQ[:, :, None]
        seen_BQA = _expand(self.mask_BA, beams)[:, None, :] & (reach_BQA >= 0)
        return (seen_BQA if window is None else seen_BQA & (distance_BQA < window))[:, None]


@dataclass(frozen=True)
class AudioContext:
    """The audio of a batch of rows, as keys and values at positions, and the rows' own positions."""

    llm: Geometry
    keys: tuple[AudioKeys, ...]
    rows_BT: Tensor
    """Position ids of the prompt, which windows need when the cache holds only keys."""
    audio_rows_BT: Tensor
    """True where a row of the sequence is none of the text's: audio (summary tokens), or one that asks again."""
    hidden_rows: tuple[tuple[frozenset[int], Tensor], ...] = ()
    """Layers, and rows [B, T] that no other row sees there."""
    places: Places | None = None
    """What each row stands for, where that was asked for."""
    watch: Watch | None = None
    """Who is shown the attention of a forward without a cache."""
    asks_BT: Tensor | None = None
    """True where a row repeats the last text row behind clips, to say what follows them; None where none does."""

    def asking(self, asks_BT: Tensor) -> AudioContext:
        """The same context where some rows repeat the last text row before them, behind the clips between.

        Such a row sees all that the row it repeats does, itself in that one's place, and the clips. No other row sees
        it.
        """
        everywhere = frozenset(range(len(self.llm.windows)))
        return replace(self, asks_BT=asks_BT, hidden_rows=(*self.hidden_rows, (everywhere, asks_BT)))

    def joined(self, layer: int) -> tuple[int, ...]:
        """Which of `keys` join the layer's own."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is None and layer in keys.layers)

    def crossing(self, layer: int) -> tuple[int, ...]:
        """Which of `keys` a block before the layer looks at."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is not None and layer in keys.layers)

    @torch.no_grad()
    def prebuilt(self) -> AudioContext:
        """The same context with every layer's K/V made now, once; without gradients."""
        return replace(self, keys=tuple(keys.prebuilt(self.llm) for keys in self.keys))

    def without(self, what: Hide) -> AudioContext:
        """The same context with some of the audio hidden.

        Raises:
            ConfigError: a span of time, where the tokens have none.
        """
        keys, rows = self.keys, self.hidden_rows
        if what.pathway != "rows":
            keys = tuple(part for one in keys for part in one.without(what))
        if what.pathway != "keys" and bool(self.audio_rows_BT.any()):
            hidden_BT = self.audio_rows_BT
            if what.placed:
                assert self.places is not None, "made without `located`"
                hidden_BT = self.places.chosen(what)
            everywhere = range(len(self.llm.windows))
            rows = (*rows, (frozenset(everywhere if what.layers is None else what.layers), hidden_BT))
        return replace(self, keys=keys, hidden_rows=rows)

    def rows_kind(self, layer: int, window: int | None) -> Kind:
        """What decides which rows a layer's queries see: a sliding window, and which of `hidden_rows` hold there."""
        return window, tuple(i for i, (layers, _) in enumerate(self.hidden_rows) if layer in layers)

    def reordered(self, order_BT: Tensor) -> AudioContext:
        """The context after the rows of the sequence were put in another order ([B, T] of indices)."""
        return replace(
            self,
            rows_BT=self.rows_BT.gather(1, order_BT),
            audio_rows_BT=self.audio_rows_BT.gather(1, order_BT),
            hidden_rows=tuple((layers, hidden_BT.gather(1, order_BT)) for layers, hidden_BT in self.hidden_rows),
            places=None if self.places is None else self.places.ordered(order_BT),
            asks_BT=None if self.asks_BT is None else self.asks_BT.gather(1, order_BT),
        )

    def view(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> AudioView:
        """What the query rows of one forward see.

        Args:
            attention_mask: [B, K] over all rows so far, cached ones included.
            position_ids: [B, Q] of the query rows. B may be a multiple of this batch (beams).

        Raises:
            PalError: when either is missing, since transformers would then guess, silently and wrongly.
        """
        if attention_mask is None or position_ids is None:
            name = "attention_mask" if attention_mask is None else "position_ids"
            raise PalError(f"a forward with audio needs {name}: positions have gaps that cannot be guessed")
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            raise PalError("a forward with audio needs the 2-D attention mask, one number per row so far")
        self.llm.check_ears()
        beams, rest = divmod(position_ids.shape[0], self.rows_BT.shape[0])
        if rest or position_ids.shape[0] != attention_mask.shape[0]:
            raise PalError(
                f"audio of {self.rows_BT.shape[0]} rows does not fit position_ids of {position_ids.shape[0]} rows "
                f"and attention_mask of {attention_mask.shape[0]}"
            )
        far = int(position_ids.max())
        windows = tuple(None if window is None or window > far else window for window in self.llm.windows)
        valid_BK = attention_mask.bool()
        kinds = tuple(self.rows_kind(layer, window) for layer, window in enumerate(windows))
        rows_seen = {
            kind: self._rows_seen(kind, valid_BK, position_ids, beams)
            for layer, kind in enumerate(kinds)
            if self.joined(layer) or kind != (None, ()) or self.watch is not None
        }
        ahead_BQ = None if self.asks_BT is None else _prompt(self.asks_BT, valid_BK, beams)[:, -position_ids.shape[1] :]
        heard = {(i, windows[layer]) for layer in range(len(windows)) for i in self.joined(layer)}
        device = position_ids.device
        apart = not self.llm.dropout and takes_apart(device)
        return AudioView(
            context=self,
            beams=beams,
            windows=windows,
            kinds=kinds,
            ropes=tuple({} if keys.built is not None else self.llm.rope(keys.turns_BA) for keys in self.keys),
            rows_seen=rows_seen,
            rows_pieces={kind: self._rows_pieces(kind, valid_BK, seen) for kind, seen in rows_seen.items()}
            if apart
            else None,
            keys_seen={}
            if apart and self.watch is None
            else {(i, w): self.keys[i].seen(w, position_ids, beams, ahead_BQ) for i, w in heard},
            keys_pieces={(i, w): self.keys[i].pieces(w, position_ids, beams, ahead_BQ) for i, w in heard}
            if apart
            else {},
            # a block looks at whole clips, however short the windows of the layer after it
            cross_seen=tuple(
                None if keys.blocks is None else keys.seen(None, position_ids, beams, ahead_BQ) for keys in self.keys
            ),
        )

    def _row_positions(self, length: int, beams: int) -> Tensor:
        """Positions of the first `length` rows: the prompt's, then one more for each generated token."""
        rows_BT = _expand(self.rows_BT, beams)
        more = length - rows_BT.shape[1]
        if more <= 0:
            return rows_BT[:, :length]
        return torch.cat((rows_BT, rows_BT[:, -1:] + torch.arange(1, more + 1, device=rows_BT.device)), dim=1)

    def _rows_pieces(self, kind: Kind, valid_BK: Tensor, seen_B1QK: Tensor) -> tuple[Piece, ...]:
        """The same as `_rows_seen`, as rectangles."""
        B, _, Q, K = seen_B1QK.shape
        whole = Piece((0, B), (0, Q), (0, K))
        if kind != (None, ()):
            return masked(seen_B1QK)
        if Q == K and bool((valid_BK[:, :-1] >= valid_BK[:, 1:]).all()):
            return (replace(whole, causal=True),)  # padding comes last, where no real row sees it
        return (whole,) if Q == 1 and bool(valid_BK.all()) else masked(seen_B1QK)

    def _rows_seen(self, kind: Kind, valid_BK: Tensor, positions_BQ: Tensor, beams: int) -> Tensor:
        """Which rows each query sees, bool [B, 1, Q, K]: causal by order, windows by position."""
        window, hiding = kind
        K, Q = valid_BK.shape[1], positions_BQ.shape[1]
        index_K = torch.arange(K, device=valid_BK.device)
        index_Q = index_K[-Q:]
        seen_BQK = valid_BK[:, None, :] & (index_K <= index_Q[:, None])
        if window is not None:
            distance_BQK = positions_BQ[:, :, None] - self._row_positions(K, beams)[:, None, :]
            seen_BQK = seen_BQK & (distance_BQK < window)
        if self.asks_BT is not None:
            text_BK = valid_BK & ~_prompt(self.audio_rows_BT, valid_BK, beams)
            repeated_BQ = torch.where(text_BK, index_K, -1).cummax(1).values[:, -Q:]
            asks_BQ = _prompt(self.asks_BT, valid_BK, beams)[:, -Q:]
            seen_BQK = seen_BQK & ~(asks_BQ[:, :, None] & (index_K == repeated_BQ[:, :, None]))
        for i in hiding:
            hidden_BK = _prompt(self.hidden_rows[i][1], valid_BK, beams)
            # a hidden row still sees itself, since a row without any key would be NaN
            seen_BQK = seen_BQK & (~hidden_BK[:, None, :] | (index_K == index_Q[:, None]))
        # padding sees everything, for the same reason; nothing ever reads it
        return (seen_BQK | ~valid_BK[:, -Q:, None])[:, None]


@dataclass(frozen=True, eq=False)
class AudioView:
    """An `AudioContext` as the query rows of one forward see it; nothing in it changes, so it compiles whole."""

    context: AudioContext
    beams: int
    ropes: tuple[Rope, ...]
    """For each of the context's `keys`."""
    windows: tuple[int | None, ...]
    """Per layer, the LLM's sliding window where it is shorter than what there is."""
    kinds: tuple[Kind, ...]
    """Per layer, its place in `rows_seen`."""
    rows_seen: dict[Kind, Tensor]
    """Per kind of layer, which rows each query sees: bool [B, 1, Q, K]."""
    rows_pieces: dict[Kind, tuple[Piece, ...]] | None
    """The same as rectangles, where attention can take each set of keys by itself; else None."""
    keys_seen: dict[tuple[int, int | None], Tensor]
    """Per number in `keys` and sliding window, which of them each query sees: bool [B, 1, Q, A]."""
    keys_pieces: dict[tuple[int, int | None], tuple[Piece, ...]]
    """The same as rectangles."""
    cross_seen: tuple[Tensor | None, ...]
    """For each of `keys` with blocks, which of them each query sees: bool [B, 1, Q, A]."""

    def sets(self, layer: int, key: Tensor, value: Tensor) -> list[Keys] | None:
        """The layer's own keys, then those that join them, each with the rectangles that are seen.

        None where the layer must be taken under one mask; see `whole`.
        """
        if self.rows_pieces is None:
            return None
        window, kind = self.windows[layer], self.kinds[layer]
        rows = self.rows_pieces[kind]
        if key.shape[2] != self.rows_seen[kind].shape[3]:  # a windowed cache drops old rows
            rows = masked(self.rows_seen[kind][..., -key.shape[2] :])
        joined = [(i, self.keys_pieces[i, window]) for i in self.context.joined(layer)]
        return [Keys(key, value, rows), *(Keys(*self._made(i, layer), pieces) for i, pieces in joined if pieces)]

    def whole(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values of a layer as one, and which each query sees: bool [B, 1, Q, A + K]."""
        window = self.windows[layer]
        seen = [self.rows_seen[self.kinds[layer]][..., -key.shape[2] :]]
        parts = [(key, value)]
        for i in self.context.joined(layer):
            seen.append(self.keys_seen[i, window])
            parts.append(self._made(i, layer))
        keys, values = (torch.cat([x.to(key.dtype) for x in same], dim=2) for same in zip(*parts, strict=True))
        return keys, values, torch.cat(seen, dim=3)

    def ordinary(self, layer: int) -> bool:
        """Whether transformers' own mask says all that this layer's queries see; it counts windows in rows."""
        return not self.context.joined(layer) and self.kinds[layer] == (None, ())

    def show(self, layer: int, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Let the context's watch see how a layer's attention is shared; computed here, beside the layer's own."""
        watch = self.context.watch
        if watch is None:
            return
        window, rows_BN = self.windows[layer], watch.rows_BN
        joined = self.context.joined(layer)
        keys = [key, *(self._made(i, layer)[0] for i in joined)]
        seen = [self.rows_seen[self.kinds[layer]], *(self.keys_seen[i, window] for i in joined)]
        weights_BHNX = attention_weights(
            _rows(query, rows_BN), torch.cat(keys, 2), _rows(torch.cat(seen, 3), rows_BN), scale
        )
        rows_BHNK, *keys_BHNA = weights_BHNX.split([k.shape[2] for k in keys], dim=3)
        watch.attended(layer, Weights(rows_BHNK, dict(zip(joined, keys_BHNA, strict=True))))

    def _made(self, which: int, layer: int) -> tuple[Tensor, Tensor]:
        keys, llm = self.context.keys[which], self.context.llm
        if keys.built is not None:
            k_BGAC, v_BGAC = keys.built[layer]
        else:
            k_BGAC, v_BGAC = keys.keys_values(layer, llm, self.ropes[which])
        return _expand(k_BGAC, self.beams), _expand(v_BGAC, self.beams)

    def crosses(self, layer: int) -> bool:
        """Whether blocks stand before a layer."""
        return bool(self.context.crossing(layer))

    def cross(self, layer: int, x_BQD: Tensor) -> Tensor:
        """The rows that go into a layer, after the blocks that stand before it."""
        for i in self.context.crossing(layer):
            blocks, seen_B1QA = self.context.keys[i].blocks, self.cross_seen[i]
            assert blocks is not None and seen_B1QA is not None
            k_BGAC, v_BGAC = self._made(i, layer)
            if self.context.watch is not None:
                weights_BHQA = blocks[layer].weights(x_BQD, k_BGAC, seen_B1QA)
                self.context.watch.crossed(layer, i, _rows(weights_BHQA, self.context.watch.rows_BN))
            x_BQD = blocks[layer](x_BQD, k_BGAC, v_BGAC, seen_B1QA)
        return x_BQD


def attention_weights(q_BHQC: Tensor, k_BGKC: Tensor, seen_B1QK: Tensor, scale: float | None) -> Tensor:
    """Softmax of the scores, float32 [B, H, Q, K]: queries H, which may be a multiple of the keys' G.

    A query that sees no key gets zeros. Nothing of the attention that models run is used.
    """
    q_BGRQC = q_BHQC.float().unflatten(1, (k_BGKC.shape[1], -1))
    scores_BHQK = (q_BGRQC @ k_BGKC.float()[:, :, None].mT).flatten(1, 2)
    scores_BHQK = scores_BHQK * (q_BHQC.shape[-1] ** -0.5 if scale is None else scale)
    return scores_BHQK.masked_fill(~seen_B1QK, -torch.inf).softmax(-1).nan_to_num(0.0)


def _rows(x_BHQX: Tensor, rows_BN: Tensor) -> Tensor:
    """Some of the rows of each item -> [B, H, N, X]."""
    return x_BHQX.gather(2, rows_BN[:, None, :, None].expand(-1, x_BHQX.shape[1], -1, x_BHQX.shape[3]))


def rotate(x_BGAC: Tensor, cos_BAC: Tensor, sin_BAC: Tensor) -> Tensor:
    """RoPE in the half-split layout that all supported families share."""
    cos, sin = cos_BAC[:, None], sin_BAC[:, None]
    first, second = x_BGAC.chunk(2, dim=-1)
    return x_BGAC * cos + torch.cat((-second, first), dim=-1) * sin


def gather(table_X: Tensor, index_BT: Tensor) -> Tensor:
    """Entries [X, ...] by index -> [B, T, ...]; quicker to differentiate than `table_X[index_BT]`."""
    return table_X.index_select(0, index_BT.flatten()).unflatten(0, index_BT.shape)


def _prompt(x_BT: Tensor, valid_BK: Tensor, beams: int) -> Tensor:
    """What is said of the prompt's rows, for all rows so far [B, K]: False for those that were generated."""
    x_BK = _expand(x_BT, beams)[:, : valid_BK.shape[1]]
    return F.pad(x_BK, (0, valid_BK.shape[1] - x_BK.shape[1]))


def _expand(x: Tensor, beams: int) -> Tensor:
    return x if beams == 1 else x.repeat_interleave(beams, dim=0)
