"""Clips and pictures as part of the page, within a budget: what would exceed it is left out, and said."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from pal.audio import load
from pal.errors import AudioError
from pal.lab.numbers import size
from pal.plots import MISSING, Draw, render
from pal.report.page import PagePicture, Sound, TimeAxis

RATE = 16_000
"""Most Hz of a clip in a page; mono, 16 bits a sample."""
AUDIO_BYTES = 20_000_000
"""Most that the clips of a page take as text. A minute takes 2.6 MB."""
PICTURE_BYTES = 20_000_000
"""The same for pictures."""


@dataclass
class MediaEmbedder:
    """Turns files into data URIs until the budget is spent, counted in characters of the page."""

    audio_bytes: int = AUDIO_BYTES
    """Left for clips."""
    picture_bytes: int = PICTURE_BYTES
    roots: Sequence[Path] = ()
    """Folders in which clips may lie that are not where they were."""
    left_out: list[str] = field(default_factory=list)
    """What did not fit, by name."""
    damaged: list[str] = field(default_factory=list)
    """Pictures that are none, and what to do."""

    def sound(self, path: str | Path) -> Sound:
        """A clip, ready to play, or why not. Never a shortened one."""
        name = Path(path).name
        try:
            rate = min(RATE, _rate(path))
            samples_N = load(path, rate).samples_N
        except AudioError as error:
            return Sound(name, None, f"no sound: {error}")
        file = io.BytesIO()
        soundfile.write(file, samples_N.numpy(), rate, format="WAV", subtype="PCM_16")
        source = _uri("audio/wav", file.getvalue())
        if len(source) > self.audio_bytes:
            self.left_out.append(name)
            return Sound(name, None, f"{name} ({len(samples_N) / rate:.1f} s) is left out to keep this page small.")
        self.audio_bytes -= len(source)
        return Sound(name, source)

    def picture(self, path: Path) -> tuple[str | None, str]:
        """A PNG as data URI, or None and why."""
        if not path.is_file():
            return None, f"{path.name} is not there; {MISSING}"
        data = path.read_bytes()
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            self.damaged.append(f"{path}: damaged, no PNG picture; make it again")
            return None, f"{path.name} is damaged"
        return self._png(path.name, data)

    def plot(self, alt: str, draw: Draw, size: tuple[float, float], caption: str = "", title: str = "") -> PagePicture:
        """A plot made here, within the same budget as pictures; or why it is not there."""
        rendered = render(draw, size)
        if rendered is None:
            return PagePicture(alt, missing=MISSING, caption=caption, title=title)
        source, missing = self._png(alt, rendered.png)
        axes = [TimeAxis(**sides) for sides in rendered.time_axes]
        return PagePicture(alt, source, missing, title, caption, time=axes)

    def _png(self, name: str, data: bytes) -> tuple[str | None, str]:
        source = _uri("image/png", data)
        if len(source) > self.picture_bytes:
            self.left_out.append(name)
            return None, f"{name} ({size(len(data))}) is left out to keep this page small."
        self.picture_bytes -= len(source)
        return source, ""


def _rate(path: str | Path) -> int:
    """Hz of a file; `RATE` where only decoding tells."""
    try:
        return int(soundfile.info(path).samplerate)
    except soundfile.SoundFileError:
        return RATE


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
