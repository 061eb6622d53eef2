"""`AudioKV`: audio keys and values of clips, computed once for many questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pal.backbone.stream_kv import StreamKV
from pal.digest import digest as content_digest
from pal.errors import BundleError, PalError
from pal.files import write_tensors

_FORMATS = ("pal-audio-kv-3", "pal-audio-kv-4")
"""Formats of files: the second one is for thinned clips, which earlier readers do not know."""


@dataclass(frozen=True)
class AudioKV:
    """Audio KV cache of clips: a `StreamKV` for each stream of the model (one, unless it is an ensemble).

    Keys are stored before RoPE, so that a clip can stand at any position; `Integration.forward` takes
    `AudioKV` in place of features.
    """

    streams: tuple[StreamKV, ...]
    durations: tuple[float, ...]
    """Seconds of each clip."""
    digest: str
    """Digest of the model that computed it."""

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.durations)

    def __repr__(self) -> str:
        clips = f"{len(self)} clip" + "s" * (len(self) != 1)
        return f"<AudioKV of {clips}, {self.seconds:.1f} s, {self.tokens} audio tokens, {self.nbytes / 1e6:.1f} MB>"

    @property
    def tokens(self) -> int:
        """Audio tokens of all clips and streams together."""
        return sum(sum(stream.lengths) for stream in self.streams)

    @property
    def seconds(self) -> float:
        """Seconds of all clips together."""
        return sum(self.durations)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def check(self, digest: str, where: str = "this audio index") -> None:
        """Raise BundleError if another model computed it."""
        if digest != self.digest:
            raise BundleError(
                f"{where} was made by another model ({self.digest[:12]}, not {digest[:12]}); "
                "ask that one (--model), or index the audio again"
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AudioKV:
        """On another device or in another float dtype; int8 tensors stay int8."""
        return replace(self, streams=tuple(stream.to(device, dtype) for stream in self.streams))

    def quantized(self) -> AudioKV:
        """K and V in int8 with one scale per head and token: about half the bytes of bf16."""
        return replace(self, streams=tuple(stream.quantized() for stream in self.streams))

    def thin(self, share: float, scores: Sequence[Tensor | None] | None = None) -> AudioKV:
        """Keep only a share of each clip's keys and values; never done by default, since answers may change.

        What stays is at its positions, as far from the text as before. Audio rows stay, too. By default, tokens that
        are evenly spaced in time stay, the same in all layers; with scores, those of the highest score in each layer.
        Neighbours are alike, so even spacing loses least: docs/audio_once.md has what each rule costs.

        Args:
            share: of the tokens, above 0 and at most 1; rounded, at least one token a clip.
            scores: for each stream, a score of each key [L, B, A], such as `pal.thinning.attention_scores`.

        Raises:
            PalError: another share, clips that were thinned already, or scores of another shape.
        """
        if not 0 < share <= 1:
            raise PalError(f"thin takes a share above 0 and at most 1, not {share:g}")
        if scores is not None and len(scores) != len(self.streams):
            raise PalError(f"thin takes scores for each of {len(self.streams)} streams, not {len(scores)}")
        each = scores or [None] * len(self.streams)
        thinner = [stream.thin(share, own) for stream, own in zip(self.streams, each, strict=True)]
        return replace(self, streams=tuple(thinner))

    def __getitem__(self, clip: int) -> AudioKV:
        """One clip, without the batch's padding."""
        clip = range(len(self))[clip]
        return replace(
            self,
            streams=tuple(stream[clip] for stream in self.streams),
            durations=self.durations[clip : clip + 1],
        )

    def copy(self) -> AudioKV:
        """The same in memory of its own; a clip of a batch is a view, which keeps the whole batch in memory."""
        return replace(self, streams=tuple(stream.copy() for stream in self.streams))

    @staticmethod
    def concat(parts: Sequence[AudioKV]) -> AudioKV:
        """The clips of all parts as one batch."""
        first = parts[0]
        for other in parts[1:]:
            other.check(first.digest, where="the other clip")
        return replace(
            first,
            streams=tuple(StreamKV.concat(same) for same in zip(*(part.streams for part in parts), strict=True)),
            durations=tuple(seconds for part in parts for seconds in part.durations),
        )

    def append(self, later: AudioKV) -> AudioKV:
        """Each clip followed by its continuation.

        Raises:
            PalError: another model or batch size, a clip that ends inside a group of the hybrid, or tokens that
                attended to one another.
        """
        later.check(self.digest, where="the other clip")
        if len(self) != len(later):
            raise PalError(f"cannot append audio of {len(later)} clips to audio of {len(self)}")
        return replace(
            self,
            streams=tuple(a.append(b) for a, b in zip(self.streams, later.streams, strict=True)),
            durations=tuple(a + b for a, b in zip(self.durations, later.durations, strict=True)),
        )

    def slice(self, start: float, end: float) -> AudioKV:
        """The part of every clip from `start` to `end` seconds, extended to whole groups.

        Raises:
            PalError: a span outside of a clip, or tokens without a time.
        """
        streams = tuple(stream.slice(start, end) for stream in self.streams)
        stretches = [stream.stretch(start, end) for stream in self.streams]
        first, last = min(a for a, _ in stretches), max(b for _, b in stretches)
        return replace(self, streams=streams, durations=tuple(min(last, whole) - first for whole in self.durations))

    def save(self, path: str | Path, **more: Any) -> None:
        """Write one safetensors file, with the digest of the model and of the content, and `more` facts about it."""
        tensors = {name: x.contiguous().cpu() for name, x in self._tensors().items()}
        about = self._about(more)
        write_tensors(Path(path), tensors, {"about": about, "sha256": content_digest(tensors, about)})

    @classmethod
    def load(cls, path: str | Path, digest: str | None = None) -> AudioKV:
        """Read a file that `save` wrote.

        Args:
            path: the file.
            digest: of the model that will use it; None skips this check.

        Raises:
            BundleError: another kind of file, a damaged one, or another model's.
        """
        if Path(path).is_dir():
            raise BundleError(f"{path} is a folder, not the index of a clip; name a file, or open it as a FolderIndex")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} is not an audio index: {str(error).splitlines()[0]}") from None
        about = metadata.get("about", "")
        if not any(about.startswith(f'{{"format": "{known}"') for known in _FORMATS):
            raise BundleError(f"{path} is not an audio index of this version; index the audio again")
        if content_digest(tensors, about) != metadata.get("sha256"):
            raise BundleError(f"{path} is damaged: its content does not match its digest; index the audio again")
        facts: dict[str, Any] = json.loads(about)
        streams = []
        for i, stream in enumerate(facts["streams"]):
            own = {name.removeprefix(f"{i}."): x for name, x in tensors.items() if name.startswith(f"{i}.")}
            streams.append(StreamKV.restored(own, stream))
        clip = cls(streams=tuple(streams), durations=tuple(facts["durations"]), digest=facts["digest"])
        if digest is not None:
            clip.check(digest, where=str(path))
        return clip

    def _about(self, more: Mapping[str, Any]) -> str:
        streams = [stream.facts() for stream in self.streams]
        known = _FORMATS[any(stream.kept_LBA is not None for stream in self.streams)]
        own = {"format": known, "digest": self.digest, "durations": self.durations, "streams": streams}
        return json.dumps({**own, **more})

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": x for i, stream in enumerate(self.streams) for name, x in stream.tensors().items()}
