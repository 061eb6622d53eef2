"""`AudioKV`: clips as an LLM remembers them, made once and asked many times."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pal.errors import BundleError, PalError

_FORMAT = "pal-audio-kv-2"
_KEEP_DTYPE = ("k_scale_LBGA", "v_scale_LBGA")


@dataclass(frozen=True)
class Layout:
    """How audio tokens, audio rows and position ids of one clip lie in time.

    Time is counted in groups: the least stretch that stands on its own. For LAL that is one token, for
    the hybrid the r tokens that share a summary.
    """

    seconds_per_token: float
    """0 where the tokens stand for no time of their own, as a Q-Former's do."""
    tokens: int = 1
    """Encoder tokens of a group."""
    rows: int = 0
    """Rows of the LLM's sequence per group; they lie after the group's keys."""
    keys: bool = True
    """Whether the tokens go in as keys and values."""

    @property
    def span(self) -> int:
        """Position ids a group reserves."""
        return self.tokens * self.keys + self.rows

    def groups(self, tokens: int) -> int:
        """Groups of a clip with so many tokens; the last one may be incomplete."""
        return -(-tokens // self.tokens)

    def key_offsets(self, tokens: int) -> Tensor:
        """Positions of a clip's keys, counted from its start: long [A], or [0] without keys."""
        if not self.keys:
            return torch.zeros(0, dtype=torch.long)
        j_A = torch.arange(tokens)
        return j_A + j_A // self.tokens * self.rows

    def row_offsets(self, tokens: int) -> Tensor:
        """Positions of a clip's rows, counted from its start: long [S]."""
        group_S = torch.arange(self.groups(tokens)).repeat_interleave(self.rows)
        within_S = torch.arange(self.rows).repeat(self.groups(tokens))
        return group_S * self.span + self.tokens * self.keys + within_S


@dataclass(frozen=True)
class AudioKV:
    """What an LLM needs of some clips, for all injected layers: keys before RoPE, values, audio rows.

    Keys are not rotated yet, so a clip can be bound to any position later; `Integration.forward` takes
    it in place of features. Real tokens come first.
    """

    k_LBGAC: Tensor
    v_LBGAC: Tensor
    """In the LLM's dtype, or int8 with `scales`."""
    rows_BSD: Tensor
    """Embeddings that go through the LLM as rows; S is 0 for LAL."""
    lengths: tuple[int, ...]
    """Audio tokens of each clip."""
    durations: tuple[float, ...]
    """Seconds of each clip."""
    layers: tuple[int, ...]
    """The LLM's layer of each [L]."""
    layout: Layout
    digest: str
    """Of the model that made it."""
    k_scale_LBGA: Tensor | None = None
    v_scale_LBGA: Tensor | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Audio tokens of all clips together."""
        return sum(self.lengths)

    @property
    def seconds_per_token(self) -> float:
        """Time scale of the tokens."""
        return self.layout.seconds_per_token

    @property
    def seconds(self) -> float:
        """Seconds of all clips together."""
        return sum(self.durations)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

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

    def check(self, digest: str, where: str = "this audio index") -> None:
        """Raises BundleError when another model made it."""
        if digest != self.digest:
            raise BundleError(
                f"{where} was made by another model ({self.digest[:12]}, not {digest[:12]}); index the audio again"
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AudioKV:
        """On another device or in another float dtype; int8 tensors stay int8."""
        moved: dict[str, Any] = {
            name: x.to(device=device, dtype=None if name in _KEEP_DTYPE or x.dtype == torch.int8 else dtype)
            for name, x in self._tensors().items()
        }
        return replace(self, **moved)

    def quantized(self) -> AudioKV:
        """K and V in int8 with one scale per head and token: about half the bytes of bf16."""
        if self.k_scale_LBGA is not None:
            return self
        k, k_scale = _quantize(self.k_LBGAC)
        v, v_scale = _quantize(self.v_LBGAC)
        return replace(self, k_LBGAC=k, v_LBGAC=v, k_scale_LBGA=k_scale, v_scale_LBGA=v_scale)

    def __getitem__(self, clip: int) -> AudioKV:
        """One clip, without the batch's padding."""
        clip = range(len(self))[clip]
        return self._with(
            self.lengths[clip : clip + 1],
            self.durations[clip : clip + 1],
            {n: x.narrow(_batch_axis(n), clip, 1) for n, x in self._tensors().items()},
        )

    @staticmethod
    def concat(parts: Sequence[AudioKV]) -> AudioKV:
        """The clips of all parts as one batch."""
        first = parts[0]
        for other in parts[1:]:
            first._check_alike(other)
        lengths = tuple(count for part in parts for count in part.lengths)
        durations = tuple(seconds for part in parts for seconds in part.durations)
        joined = {}
        for name in first._tensors():
            tensors = [part._tensors()[name] for part in parts]
            longest = max(x.shape[_time_axis(name)] for x in tensors)
            joined[name] = torch.cat([_pad(x, _time_axis(name), longest) for x in tensors], dim=_batch_axis(name))
        return first._with(lengths, durations, joined)

    def append(self, later: AudioKV) -> AudioKV:
        """Each clip followed by its continuation.

        Raises:
            PalError: another model or batch size, or a clip that ends inside a group of the hybrid.
        """
        self._check_alike(later)
        if len(self) != len(later):
            raise PalError(f"cannot append audio of {len(later)} clips to audio of {len(self)}")
        for count in self.lengths:
            if count % self.layout.tokens:
                raise PalError(
                    f"cannot append to a clip of {count} tokens: they come in groups of {self.layout.tokens}; "
                    f"cut the earlier chunk at a multiple of {self.layout.tokens * self.layout.seconds_per_token:g} s"
                )
        clips = []
        for clip in range(len(self)):
            a, b = self[clip], later[clip]
            tensors = {
                name: torch.cat((x, b._tensors()[name]), dim=_time_axis(name)) for name, x in a._tensors().items()
            }
            clips.append(a._with((a.tokens + b.tokens,), (a.seconds + b.seconds,), tensors))
        return AudioKV.concat(clips)

    def slice(self, start: float, end: float) -> AudioKV:
        """The stretch from `start` to `end` seconds of every clip, widened to whole groups.

        Raises:
            PalError: no such stretch, or tokens that stand for no time of their own.
        """
        if not self.seconds_per_token:
            raise PalError("this clip's tokens stand for no time of their own and cannot be cut; index the stretch")
        seconds = self.layout.seconds_per_token * self.layout.tokens
        first = math.floor(start / seconds + 1e-6)
        last = math.ceil(end / seconds - 1e-6)
        if not 0 <= first < last:
            raise PalError(f"cannot take {start:g} to {end:g} s of a clip: the end must lie after the start")
        a, b = first * self.layout.tokens, last * self.layout.tokens
        lengths = tuple(max(0, min(length, b) - a) for length in self.lengths)
        if not all(lengths):
            raise PalError(f"cannot take {start:g} to {end:g} s of a clip of {min(self.durations):g} s")
        durations = tuple(min(last * seconds, whole) - first * seconds for whole in self.durations)
        return self._with(
            lengths, durations, {name: self._groups(name, x, first, last) for name, x in self._tensors().items()}
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the digest of the model and of the content."""
        tensors = {name: x.contiguous().cpu() for name, x in self._tensors().items()}
        about = self._about()
        save_file(tensors, path, metadata={"about": about, "sha256": _content_digest(tensors, about)})

    @classmethod
    def load(cls, path: str | Path, digest: str | None = None) -> AudioKV:
        """Read what `save` wrote.

        Args:
            path: the file.
            digest: of the model that will hear it; None skips that check.

        Raises:
            BundleError: not such a file, a damaged one, or one that another model made.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} is not an audio index: {str(error).splitlines()[0]}") from None
        about = metadata.get("about", "")
        if not about.startswith(f'{{"format": "{_FORMAT}"'):
            raise BundleError(f"{path} is not an audio index of this version; index the audio again")
        if _content_digest(tensors, about) != metadata.get("sha256"):
            raise BundleError(f"{path} is damaged: its content does not match its digest; index the audio again")
        facts: dict[str, Any] = json.loads(about)
        clip = cls(
            **tensors,
            lengths=tuple(facts["lengths"]),
            durations=tuple(facts["durations"]),
            layers=tuple(facts["layers"]),
            layout=Layout(**facts["layout"]),
            digest=facts["digest"],
        )
        if digest is not None:
            clip.check(digest, where=str(path))
        return clip

    def _about(self) -> str:
        layout = {part.name: getattr(self.layout, part.name) for part in fields(self.layout)}
        return json.dumps(
            {
                "format": _FORMAT,
                "digest": self.digest,
                "layers": self.layers,
                "lengths": self.lengths,
                "durations": self.durations,
                "layout": layout,
            }
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def _groups(self, name: str, x: Tensor, first: int, last: int) -> Tensor:
        """The part of a tensor that belongs to the groups `first` to `last`, which is not included."""
        axis = _time_axis(name)
        each = self.layout.rows if name == "rows_BSD" else self.layout.tokens
        a, b = (min(group * each, x.shape[axis]) for group in (first, last))
        return x.narrow(axis, a, b - a)

    def _with(self, lengths: tuple[int, ...], durations: tuple[float, ...], tensors: dict[str, Tensor]) -> AudioKV:
        """Other clips of the same kind, without the padding that the longest one does not need."""
        last = self.layout.groups(max(lengths))
        cut: dict[str, Any] = {name: self._groups(name, x, 0, last) for name, x in tensors.items()}
        return replace(self, lengths=lengths, durations=durations, **cut)

    def _check_alike(self, other: AudioKV) -> None:
        other.check(self.digest, where="the other clip")
        if (self.layers, self.layout) != (other.layers, other.layout):
            raise PalError("clips of different layers or time scales cannot be joined")
        if (self.k_scale_LBGA is None) != (other.k_scale_LBGA is None):
            raise PalError("cannot join an int8 clip with one that is not; quantize both or neither")


def _batch_axis(name: str) -> int:
    return 0 if name == "rows_BSD" else 1


def _time_axis(name: str) -> int:
    return 1 if name == "rows_BSD" else 3


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return x if shape[axis] == 0 else torch.cat((x, x.new_zeros(shape)), dim=axis)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(dim=-1).clamp_min(1e-12) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _decoded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if scale is None else (x.float() * scale[..., None]).to(dtype)


def _content_digest(tensors: dict[str, Tensor], about: str) -> str:
    content = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name]
        content.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        content.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
