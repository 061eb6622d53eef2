"""`FeatureCache`: a folder with the features of frozen encoders, so that no clip is encoded twice.

DIR/
    encoders.safetensors     identity of the encoders: options, digest of the weights, and the front-ends' frames of a
                             test sound
    3f/3f8a...safetensors    one clip: features of each encoder, named by the SHA-256 of the audio file

Each clip is one file, written atomically, so any number of runs and processes can add to a folder. Files are spread
over 256 folders by the start of their names.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pal.audio import clip_sha256, clip_state
from pal.audio_tower import AudioTower
from pal.clips import clip_notes, read_waveform, warn_of
from pal.digest import digest
from pal.encoders.base import Encoder
from pal.errors import AudioError, BundleError
from pal.files import write_bytes
from pal.types import EncodedClip

_FORMAT = 1
_IDENTITY = "encoders.safetensors"
_REMAKE = "delete it and it is made anew"
_TOLERANCE = 1e-3
"""Largest absolute and relative difference of a front-end's frames between machines, from round-off."""


class FeatureCache:
    """On-disk cache of encoder features; missing clips are encoded and added.

    Each clip is encoded in a batch of its own, so its features do not depend on its first batch. (Padding changes the
    order of sums, and so the last bits of features.)

    Args:
        folder: created if it does not exist; several runs may share it.
        ears: the audio tower; its encoders must be frozen and in evaluation mode.
        precision: "fp32" or "bf16", the precision of the encoders.

    Raises:
        BundleError: the folder holds other files, or features of other encoders, front-ends or precision.
    """

    def __init__(self, folder: Path, ears: AudioTower, precision: str = "fp32") -> None:
        self.folder = folder
        self.ears = ears
        self.precision = precision
        encoders = [ears.encoder(i) for i in range(len(ears.encoders))]
        about = {
            "format": _FORMAT,
            "precision": precision,
            "sampling_rate": ears.sampling_rate,
            "encoders": [_identity(encoder) for encoder in encoders],
        }
        self.about = json.dumps(about, sort_keys=True)
        self.digest = hashlib.sha256(self.about.encode()).hexdigest()
        """SHA-256 of the encoders, their options and the precision; every entry has it."""
        self._encoding = Lock()
        self._name = lru_cache(maxsize=1 << 16)(lambda path, size, changed: clip_sha256(path))
        self._open({str(i): _test_frames(encoder) for i, encoder in enumerate(encoders)})

    def __call__(self, path: str, read_to_end: bool = False) -> EncodedClip:
        """Features of one clip; encodes and adds it if it is missing.

        With `read_to_end`, a clip of unknown length is read to the end of the file, with an `AudioWarning`, and stored
        under another name.

        Raises:
            AudioError: an unusable audio file.
            BundleError: an entry that is damaged or of other encoders.
        """
        try:
            name = self._name(path, *clip_state(path))
        except OSError as error:
            raise AudioError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
        if read_to_end:
            name += "-to-end"
        entry = self.folder / name[:2] / f"{name}.safetensors"
        if not entry.exists():
            # One at a time: loading threads share the encoders' device, and several may need the same new clip.
            with self._encoding:
                if not entry.exists():
                    self._add(entry, name, path, read_to_end)
        # Read back even if just written, so that the first use of a clip equals all others.
        return self._read(entry, name)

    def _open(self, frames: dict[str, Tensor]) -> None:
        """Compare the folder's encoders with these, or write the identity of these into an empty folder."""
        file = self.folder / _IDENTITY
        # List first: another run writes the identity before any entry.
        found = sorted(path.name for path in self.folder.glob("[!.]*"))
        if not file.exists():
            if found:
                raise BundleError(f"{self.folder}: holds '{found[0]}' and is no feature cache; give an empty folder")
            _write(file, frames, self.about)
        about, theirs = _load(file, "delete the folder; its features are made anew")
        difference = _difference(json.loads(about), json.loads(self.about))
        if difference is None:
            for name, ours in frames.items():
                if not _are_close(theirs[name], ours):
                    difference = f"encoder {name} with another front-end"
        if difference is not None:
            raise BundleError(
                f"{self.folder}: holds features of {difference}; give the cache another folder, or delete this one"
            )

    def _add(self, entry: Path, name: str, path: str, read_to_end: bool) -> None:
        wave = read_waveform(Path(path), self.ears.sampling_rate, read_to_end=read_to_end)
        warn_of(clip_notes([wave]))
        device = next(self.ears.encoders.parameters()).device
        assert not any(encoder.training for encoder in self.ears.encoders), "an encoder in training mode"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            clip = self.ears.encode_one(wave.samples_N)
        tensors = {str(i): x_AE.cpu() for i, x_AE in enumerate(clip.x_AE)}
        about = {"encoders": self.digest, "clip": name, "seconds": clip.seconds}
        _write(entry, tensors, json.dumps(about))

    def _read(self, entry: Path, name: str) -> EncodedClip:
        text, tensors = _load(entry, _REMAKE)
        about = json.loads(text)
        if about["encoders"] != self.digest or about["clip"] != name:
            raise BundleError(f"{entry}: was not made for this clip by these encoders; {_REMAKE}")
        return EncodedClip(tuple(tensors[str(i)] for i in range(len(tensors))), about["seconds"])


def _identity(encoder: Encoder) -> dict[str, Any]:
    """Everything that an encoder's features depend on, except for the code of its front-end."""
    options = encoder.standalone_config().model_dump(mode="json")
    # The digest identifies the weights, so their source does not matter.
    options = {name: value for name, value in options.items() if name not in ("path", "revision")}
    return {"class": type(encoder).__qualname__, "options": options, "weights": digest(encoder.state_dict())}


def _are_close(x_FM: Tensor, y_FM: Tensor) -> bool:
    return x_FM.shape == y_FM.shape and torch.allclose(x_FM, y_FM, atol=_TOLERANCE, rtol=_TOLERANCE)


def _test_frames(encoder: Encoder) -> Tensor:
    """Frames [F, M] of a rising tone of one second; they change with the code of the front-end."""
    seconds_N = torch.arange(encoder.sampling_rate, dtype=torch.float64) / encoder.sampling_rate
    frames_FM = encoder.frontend((0.5 * torch.sin(2 * torch.pi * (100 + 1500 * seconds_N) * seconds_N)).float())
    return frames_FM.float().cpu()


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """First difference of two identities, in words; None if they are equal."""
    for what in ("format", "precision", "sampling_rate"):
        if theirs.get(what) != ours[what]:
            return f"{what} {theirs.get(what)}, not {ours[what]}"
    if len(theirs["encoders"]) != len(ours["encoders"]):
        return f"{len(theirs['encoders'])} encoders, not {len(ours['encoders'])}"
    for i, (a, b) in enumerate(zip(theirs["encoders"], ours["encoders"], strict=True)):
        for what in ("class", "options", "weights"):
            if a[what] != b[what]:
                return f"encoder {i} ({a['class']}) with other {what}"
    return None


def _write(file: Path, tensors: dict[str, Tensor], about: str) -> None:
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    data = save(tensors, metadata={"about": about, "sha256": digest(tensors, about)})
    try:
        write_bytes(file, data)
    except OSError as error:
        raise BundleError(f"{file}: cannot be written ({error.strerror}); make room, or give another folder") from None


def _load(file: Path, remedy: str) -> tuple[str, dict[str, Tensor]]:
    """Read a file of `_write`. Raises BundleError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError) as error:
        fault = str(error).splitlines()[0]
        raise BundleError(f"{file}: damaged ({fault}); {remedy}") from None
    if "about" not in metadata or metadata.get("sha256") != digest(tensors, metadata["about"]):
        raise BundleError(f"{file}: damaged (its content is not that of its digest); {remedy}")
    return metadata["about"], tensors
