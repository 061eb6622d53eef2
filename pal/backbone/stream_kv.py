"""`StreamKV`: audio keys, values and audio rows of one stream, and their layout in time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pal.errors import PalError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_KEEP_DTYPE = ("k_scale_LBGA", "v_scale_LBGA", "kept_LBA")


@dataclass(frozen=True)
class Layout:
    """How audio tokens, audio rows and position ids of one clip lie in time.

    A clip is a sequence of groups of tokens, which cannot be divided. For LAL a group is one token, for the
    hybrid the r tokens that share a summary token. Keys and rows of a clip have a place in the order of the
    conversation, which says what sees what, and position ids, by which RoPE rotates.
    """

    seconds_per_token: float
    """0 for tokens without a time, such as a Q-Former's."""
    tokens: int = 1
    """Encoder tokens of a group."""
    rows: int = 0
    """Rows of the LLM's sequence per group; they lie after the group's keys."""
    keys: bool = True
    """The tokens enter as keys and values."""
    beside: bool = False
    """The clip reserves no position ids; RoPE rotates keys by their index in the clip (cross-attention)."""
    before: bool = False
    """With `beside`: RoPE rotates keys and rows as if they stood directly before the next text row, the last one at
    the position before it; they share these positions with the text before the clip."""
    joint: bool = False
    """Tokens of a clip attended to one another inside the LLM, so that chunks of a clip cannot be joined."""
    per_position: int = 1
    """Consecutive places of a clip that share a position id."""

    @property
    def places(self) -> int:
        """Places of a group in the order of the conversation."""
        return self.tokens * self.keys + self.rows

    def reserved(self, tokens: int) -> int:
        """Number of position ids that a clip of `tokens` tokens reserves."""
        return 0 if self.beside else self._width(tokens)

    def _width(self, tokens: int) -> int:
        """Number of position ids from a clip's first place to its last."""
        return -(-self.groups(tokens) * self.places // self.per_position)

    def groups(self, tokens: int) -> int:
        """Number of groups in a clip of `tokens` tokens; the last group may be incomplete."""
        return -(-tokens // self.tokens)

    def key_offsets(self, tokens: int) -> Ints:
        """Places of a clip's keys, counted from its start: [A], or [0] without keys."""
        j_A = np.arange(tokens * self.keys)
        return j_A + j_A // self.tokens * self.rows

    def key_positions(self, tokens: int, start: int) -> Ints:
        """Positions of a clip's keys in sliding windows, for a clip at position `start`: [A], or [0] without keys."""
        if self.beside:
            return np.full(tokens * self.keys, start)
        return start + self.key_offsets(tokens) // self.per_position

    def key_rope_positions(self, tokens: int, start: int, earlier: int = 0) -> Ints:
        """Positions that RoPE rotates keys by: [A], or [0] without keys.

        Args:
            tokens: of the clip, or of a later part of it.
            start: position of the clip.
            earlier: tokens of the clip before this part, in whole groups.
        """
        if self.beside and not self.before:
            return earlier + np.arange(tokens * self.keys)
        return self._turned(tokens, start, earlier, self.key_offsets(tokens))

    def row_positions(self, tokens: int, start: int, earlier: int = 0) -> Ints:
        """Position ids of a clip's rows, or of those of a later part of it: [S]; see `key_rope_positions`."""
        return self._turned(tokens, start, earlier, self.row_offsets(tokens))

    def _turned(self, tokens: int, start: int, earlier: int, offsets_X: Ints) -> Ints:
        """Position ids of places, counted from the first of this part."""
        first = start - self._width(earlier + tokens) if self.before else start
        return first + (self.groups(earlier) * self.places + offsets_X) // self.per_position

    def key_times(self, tokens: int) -> Floats:
        """Start and end of each key's token in seconds of the clip: [A, 2]; NaN for tokens without a time."""
        return self._seconds(np.arange(tokens * self.keys)[:, None] + np.array([0, 1]))

    def row_times(self, tokens: int) -> Floats:
        """Start and end of each row's group in seconds from the start of the clip: [S, 2]."""
        group_S = np.arange(self.groups(tokens)).repeat(self.rows)
        return self._seconds(np.minimum((group_S[:, None] + np.array([0, 1])) * self.tokens, tokens))

    def _seconds(self, tokens_X: Ints) -> Floats:
        return np.asarray(tokens_X * (self.seconds_per_token or math.nan), np.float64)

    def row_offsets(self, tokens: int) -> Ints:
        """Places of a clip's rows, counted from its start: [S]."""
        group_S = np.arange(self.groups(tokens)).repeat(self.rows)
        within_S = np.tile(np.arange(self.rows), self.groups(tokens))
        return group_S * self.places + self.tokens * self.keys + within_S


@dataclass(frozen=True)
class StreamKV:
    """Audio KV cache of one stream: keys before RoPE, values, audio rows.

    Real tokens come first.
    """

    k_LBGAC: Tensor
    v_LBGAC: Tensor
    """In the LLM's dtype, or int8 with `scales`."""
    rows_BSD: Tensor
    """Embeddings that go through the LLM as rows; S is 0 for LAL."""
    lengths: tuple[int, ...]
    """Audio tokens of each clip."""
    layers: tuple[int, ...]
    """LLM layer of each entry of the axis L."""
    layout: Layout
    k_scale_LBGA: Tensor | None = None
    v_scale_LBGA: Tensor | None = None
    kept_LBA: Tensor | None = None
    """After `thin`: the token of each key, int32, ascending; other layers may keep other tokens."""
    counts: tuple[int, ...] | None = None
    """After `thin`: keys of each clip in each layer; None: as many as tokens."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def facts(self) -> dict[str, Any]:
        """All fields but the tensors, for JSON."""
        layout = {part.name: getattr(self.layout, part.name) for part in fields(self.layout)}
        thinned = {} if self.counts is None else {"counts": self.counts}
        return {"lengths": self.lengths, "layers": self.layers, "layout": layout, **thinned}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> StreamKV:
        """A `StreamKV` from its `tensors` and `facts`."""
        layout = Layout(**facts["layout"])
        counts = tuple(facts["counts"]) if "counts" in facts else None
        lengths, layers = tuple(facts["lengths"]), tuple(facts["layers"])
        return cls(**tensors, lengths=lengths, layers=layers, layout=layout, counts=counts)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of one layer of the LLM, each [B, G, A, C], never int8."""
        at = self.layers.index(layer)
        return (
            _decoded(
                self.k_LBGAC[at], None if self.k_scale_LBGA is None else self.k_scale_LBGA[at], self.rows_BSD.dtype
            ),
            _decoded(
                self.v_LBGAC[at], None if self.v_scale_LBGA is None else self.v_scale_LBGA[at], self.rows_BSD.dtype
            ),
        )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> StreamKV:
        """On another device or in another float dtype; int8 tensors stay int8."""
        moved: dict[str, Any] = {
            name: x.to(device=device, dtype=None if name in _KEEP_DTYPE or x.dtype == torch.int8 else dtype)
            for name, x in self.tensors().items()
        }
        return replace(self, **moved)

    def quantized(self) -> StreamKV:
        """K and V in int8 with one scale per head and token."""
        if self.k_scale_LBGA is not None:
            return self
        k, k_scale = _quantize(self.k_LBGAC)
        v, v_scale = _quantize(self.v_LBGAC)
        return replace(self, k_LBGAC=k, v_LBGAC=v, k_scale_LBGA=k_scale, v_scale_LBGA=v_scale)

    def thin(self, share: float, scores_LBA: Tensor | None = None) -> StreamKV:
        """Keep a share of each clip's keys in each layer, evenly or by score; see `AudioKV.thin`."""
        if self.kept_LBA is not None:
            raise PalError("this clip was thinned already; thin the whole one")
        if not self.layers or not self.layout.keys:
            return self
        shape = self.k_LBGAC[:, :, 0, :, 0].shape
        if scores_LBA is not None and scores_LBA.shape != shape:
            raise PalError(
                f"scores of shape {list(scores_LBA.shape)} are not those of {list(shape)} layers, clips, tokens"
            )
        counts = tuple(max(1, round(share * length)) for length in self.lengths)
        kept_LBA = torch.zeros(*shape[:2], max(counts), dtype=torch.int32, device=self.k_LBGAC.device)
        for clip, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if scores_LBA is None:
                best_LA = (2 * torch.arange(count) + 1) * length // (2 * count)  # the middle of equal stretches
            else:
                best_LA = scores_LBA[:, clip, :length].topk(count, dim=-1).indices.sort(-1).values
            kept_LBA[:, clip, :count] = best_LA.to(kept_LBA)
        index_LB1A = kept_LBA[:, :, None].long()
        thinner: dict[str, Any] = {}
        for name, x in self.tensors().items():
            if name != "rows_BSD":
                index = index_LB1A.reshape(*index_LB1A.shape, *[1] * (x.ndim - 4)).expand(
                    -1, -1, x.shape[2], -1, *x.shape[4:]
                )
                thinner[name] = x.gather(3, index)
        return replace(self, **thinner, kept_LBA=kept_LBA, counts=counts)

    def kept(self) -> dict[int, list[Ints]] | None:
        """After `thin`: for each layer and clip, the tokens that have keys; else None."""
        if self.kept_LBA is None or self.counts is None:
            return None
        kept_LBA = self.kept_LBA.cpu().numpy().astype(np.int64)
        counts = self.counts
        return {
            layer: [kept_A[:count] for kept_A, count in zip(kept_BA, counts, strict=True)]
            for layer, kept_BA in zip(self.layers, kept_LBA, strict=True)
        }

    def __getitem__(self, clip: int) -> StreamKV:
        """One clip, without the batch's padding."""
        one = {n: x.narrow(_batch_axis(n), clip, 1) for n, x in self.tensors().items()}
        return self._with(self.lengths[clip : clip + 1], one, self.counts and self.counts[clip : clip + 1])

    def copy(self) -> StreamKV:
        """The same in memory of its own."""
        copies: dict[str, Any] = {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in self.tensors().items()
        }
        return replace(self, **copies)

    @staticmethod
    def concat(parts: Sequence[StreamKV]) -> StreamKV:
        """The clips of all parts as one batch."""
        first = parts[0]
        for other in parts[1:]:
            first._check_alike(other)
        joined = {}
        for name in first.tensors():
            tensors = [part.tensors()[name] for part in parts]
            longest = max(x.shape[_time_axis(name)] for x in tensors)
            joined[name] = torch.cat([_pad(x, _time_axis(name), longest) for x in tensors], dim=_batch_axis(name))
        counts = None if first.counts is None else tuple(count for part in parts for count in part.counts or ())
        return first._with(tuple(count for part in parts for count in part.lengths), joined, counts)

    def append(self, later: StreamKV) -> StreamKV:
        """Each clip followed by its continuation."""
        self._check_alike(later)
        self._check_whole()
        if self.layout.joint:
            raise PalError("audio whose tokens were made from one another cannot be appended to; index it whole")
        for count in self.lengths:
            if count % self.layout.tokens:
                raise PalError(
                    f"cannot append to a clip of {count} tokens: they come in groups of {self.layout.tokens}; "
                    f"cut the earlier chunk at a multiple of {self.layout.tokens * self.layout.seconds_per_token:g} s"
                )
        clips = []
        for clip in range(len(self.lengths)):
            a, b = self[clip], later[clip]
            tensors = {name: torch.cat((x, b.tensors()[name]), dim=_time_axis(name)) for name, x in a.tensors().items()}
            clips.append(a._with((a.lengths[0] + b.lengths[0],), tensors))
        return StreamKV.concat(clips)

    def slice(self, start: float, end: float) -> StreamKV:
        """The part of every clip from `start` to `end` seconds, extended to whole groups."""
        self._check_whole()
        first, last = self.groups_between(start, end)
        a, b = first * self.layout.tokens, last * self.layout.tokens
        lengths = tuple(max(0, min(length, b) - a) for length in self.lengths)
        if not all(lengths):
            shortest = min(self.lengths) * self.layout.seconds_per_token
            raise PalError(f"cannot take {start:g} to {end:g} s of a clip of {shortest:g} s")
        return self._with(lengths, {name: self._groups(name, x, first, last) for name, x in self.tensors().items()})

    def blocks(self, tokens: int) -> Iterator[StreamKV]:
        """One clip in parts of at most `tokens` tokens, but of one group at least, without a copy."""
        self._check_whole()
        (length,) = self.lengths
        each = max(1, tokens // self.layout.tokens)
        for first in range(0, self.layout.groups(length), each):
            parts: dict[str, Any] = {n: self._groups(n, x, first, first + each) for n, x in self.tensors().items()}
            begin = first * self.layout.tokens
            yield replace(self, lengths=(min(length - begin, each * self.layout.tokens),), **parts)

    def groups_between(self, start: float, end: float) -> tuple[int, int]:
        """Groups that overlap a time span in seconds: the first, and one past the last."""
        if not self.layout.seconds_per_token:
            raise PalError("this clip's tokens stand for no time of their own and cannot be cut; index the stretch")
        if not (0 <= start < end < math.inf):
            raise PalError(
                f"cannot take {start:g} to {end:g} s of a clip; give its first second, 0 or above, and a later one"
            )
        seconds = self.layout.seconds_per_token * self.layout.tokens
        first = math.floor(start / seconds + 1e-6)
        last = math.ceil(end / seconds - 1e-6)
        return first, last

    def stretch(self, start: float, end: float) -> tuple[float, float]:
        """Start and end in seconds of what `slice` returns."""
        seconds = self.layout.seconds_per_token * self.layout.tokens
        first, last = self.groups_between(start, end)
        return first * seconds, last * seconds

    def _groups(self, name: str, x: Tensor, first: int, last: int) -> Tensor:
        """The part of a tensor for groups `first` up to, not including, `last`."""
        axis = _time_axis(name)
        each = self.layout.rows if name == "rows_BSD" else self.layout.tokens
        a, b = (min(group * each, x.shape[axis]) for group in (first, last))
        return x.narrow(axis, a, b - a)

    def _with(
        self, lengths: tuple[int, ...], tensors: dict[str, Tensor], counts: tuple[int, ...] | None = None
    ) -> StreamKV:
        """The same layout with other clips, without padding beyond the longest one."""
        last = self.layout.groups(max(lengths))
        cut: dict[str, Any] = {name: self._groups(name, x, 0, last) for name, x in tensors.items()}
        if counts is not None:
            longest = max(counts)
            cut = {n: x if n == "rows_BSD" else x.narrow(_time_axis(n), 0, longest) for n, x in cut.items()}
        return replace(self, lengths=lengths, counts=counts, **cut)

    def _check_whole(self) -> None:
        if self.kept_LBA is not None:
            raise PalError("a thinned clip has gaps, so it cannot be cut, continued or read in blocks; thin it last")

    def _check_alike(self, other: StreamKV) -> None:
        if (self.layers, self.layout) != (other.layers, other.layout):
            raise PalError("clips of different layers or time scales cannot be joined")
        if (self.k_scale_LBGA is None) != (other.k_scale_LBGA is None):
            raise PalError("cannot join an int8 clip with one that is not; quantize both or neither")
        if (self.kept_LBA is None) != (other.kept_LBA is None):
            raise PalError("cannot join a thinned clip with one that is not; thin both or neither")


def _batch_axis(name: str) -> int:
    return 0 if name == "rows_BSD" else 1


def _time_axis(name: str) -> int:
    return {"rows_BSD": 1, "kept_LBA": 2}.get(name, 3)


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return x if shape[axis] == 0 else torch.cat((x, x.new_zeros(shape)), dim=axis)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(dim=-1).clamp_min(1e-12) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _decoded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if scale is None else (x.float() * scale[..., None]).to(dtype)
