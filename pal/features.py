"""`FeatureCache`: what frozen encoders make of clips, kept in a folder, so that no clip is encoded twice.

DIR/
    encoders.safetensors     whose features these are: options, digest of the weights, and the front-ends' frames
                             of a test sound
    3f/3f8a...safetensors    one clip: the tokens of each encoder, named by the SHA-256 of the audio file

A file a clip: an entry is there whole or not at all, any number of runs and processes can add to a folder, and
reading a batch reads just its clips. Files are spread over 256 folders by the start of their names.
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

from pal.audio_tower import AudioTower
from pal.clips import clip_notes, read_waveform, warn_of
from pal.digest import digest
from pal.encoders.base import Encoder
from pal.errors import AudioError, BundleError
from pal.files import sha256, write_bytes
from pal.types import EncodedClip

_FORMAT = 1
_ABOUT = "encoders.safetensors"
_REMAKE = "delete it and it is made anew"
_CLOSE = 1e-3
"""Largest difference, absolute and relative, of a front-end's frames that is round-off of another machine."""


class FeatureCache:
    """On-disk cache of encoder features; a clip that is missing is encoded into it.

    Every clip is encoded by itself, so what it sounds like does not depend on which batch it was first met in.
    In a padded batch the same sums are done in another order: features then differ in their last bits.

    Args:
        folder: made when it is not there; several runs may share it.
        ears: whose encoders, which are frozen and in evaluation mode while the cache is in use.
        precision: "fp32" or "bf16", in which the encoders compute.

    Raises:
        BundleError: the folder holds something else, or features that other encoders, front-ends or
            another precision gave.
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
        """Of encoders, front-ends' options and precision; every entry names it."""
        self._encoding = Lock()
        self._name = lru_cache(maxsize=1 << 16)(lambda path, size, changed: sha256(Path(path)))
        self._open({str(i): _test_frames(encoder) for i, encoder in enumerate(encoders)})

    def __call__(self, path: str, read_to_end: bool = False) -> EncodedClip:
        """One clip; encoded where the folder does not have it yet.

        With `read_to_end`, one whose end cannot be known is taken as far as it goes, with an `AudioWarning`, under a
        name of its own.

        Raises:
            AudioError: a file that cannot be used.
            BundleError: an entry that is damaged or was put there by other encoders.
        """
        try:
            status = Path(path).stat()
            name = self._name(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise AudioError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
        if read_to_end:
            name += "-to-end"
        entry = self.folder / name[:2] / f"{name}.safetensors"
        if not entry.exists():
            # One after the other: the loading threads share the encoders' device, and may meet the same new clip.
            with self._encoding:
                if not entry.exists():
                    self._add(entry, name, path, read_to_end)
        # Read back even when just made, so that a clip's first visit has what all others have.
        return self._read(entry, name)

    def _open(self, frames: dict[str, Tensor]) -> None:
        """Check whose folder it is, or make it that of these encoders."""
        file = self.folder / _ABOUT
        # Listed before looking for the file, which is there before any entry is.
        found = sorted(path.name for path in self.folder.glob("[!.]*"))
        if not file.exists():
            if found:
                raise BundleError(f"{self.folder}: holds '{found[0]}' and is no feature cache; give an empty folder")
            _write(file, frames, self.about)
        about, theirs = _load(file, "delete the folder; its features are made anew")
        difference = _difference(json.loads(about), json.loads(self.about))
        if difference is None:
            for name, ours in frames.items():
                same = theirs[name].shape == ours.shape and torch.allclose(theirs[name], ours, atol=_CLOSE, rtol=_CLOSE)
                if not same:
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
    """What an encoder's features depend on, but for the code of its front-end."""
    options = encoder.standalone_config().model_dump(mode="json")
    # The weights say what they are, wherever they came from.
    options = {name: value for name, value in options.items() if name not in ("path", "revision")}
    return {"class": type(encoder).__qualname__, "options": options, "weights": digest(encoder.state_dict())}


def _test_frames(encoder: Encoder) -> Tensor:
    """Frames [F, M] of a second of a rising tone: what a front-end does to it changes when its code does."""
    seconds_N = torch.arange(encoder.sampling_rate, dtype=torch.float64) / encoder.sampling_rate
    frames_FM = encoder.frontend((0.5 * torch.sin(2 * torch.pi * (100 + 1500 * seconds_N) * seconds_N)).float())
    return frames_FM.float().cpu()


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What is not the same, in words."""
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
    """What `_write` wrote; raises BundleError unless it is that, byte for byte."""
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
