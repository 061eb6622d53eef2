"""Embedding of clips and pictures in a page, within a size budget; those beyond it are left out with a note."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from pal.audio import load
from pal.errors import AudioError
from pal.lab.numbers import format_bytes
from pal.plots import MISSING, Draw, render
from pal.report.page import PagePicture, Sound, TimeAxis

RATE = 16_000
"""Highest sampling rate of an embedded clip in Hz; clips are mono with 16 bits a sample."""
AUDIO_BYTES = 20_000_000
"""Maximum size of all clips of a page, in base64. A minute of audio takes 2.6 MB."""
PICTURE_BYTES = 20_000_000
"""Maximum size of all pictures of a page, in base64."""


@dataclass
class MediaEmbedder:
    """Embeds files as data URIs until the budget, in characters of the page, is used up."""

    audio_bytes: int = AUDIO_BYTES
    """Budget left for clips."""
    picture_bytes: int = PICTURE_BYTES
    """Budget left for pictures."""
    roots: Sequence[Path] = ()
    """Folders to search for clips that have been moved."""
    left_out: list[str] = field(default_factory=list)
    """Names of files beyond the budget."""
    damaged: list[str] = field(default_factory=list)
    """Messages about files that are no PNG."""

    def sound(self, path: str | Path) -> Sound:
        """Embed a whole clip; if it is unusable or beyond the budget, without a source, with the reason."""
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
        """Embed a PNG file: (data URI, ""), or (None, reason)."""
        if not path.is_file():
            return None, f"{path.name} is missing; {MISSING}"
        data = path.read_bytes()
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            self.damaged.append(f"{path}: damaged, not a PNG picture; make it again")
            return None, f"{path.name} is damaged"
        return self._png(path.name, data)

    def plot(self, alt: str, draw: Draw, size: tuple[float, float], caption: str = "", title: str = "") -> PagePicture:
        """Render and embed a plot, within the budget of pictures; if that fails, without a source, with the reason."""
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
            return None, f"{name} ({format_bytes(len(data))}) is left out to keep this page small."
        self.picture_bytes -= len(source)
        return source, ""


def _rate(path: str | Path) -> int:
    """Sampling rate of a file in Hz; `RATE` if it is not in the header."""
    try:
        return int(soundfile.info(path).samplerate)
    except soundfile.SoundFileError:
        return RATE


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
