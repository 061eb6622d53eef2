"""What a probe found, and the folder it becomes.

| file | content |
|---|---|
| `probe.json` | everything in numbers; written last, so that it is there if and only if the folder is complete |
| `*.png` | its pictures, where matplotlib is installed |
| `*.wav` | the clips it is about, where hearing them helps |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
from torch import Tensor

import pal
from pal.errors import BundleError, ConfigError
from pal.evaluate.score import jsonable, write_json
from pal.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pal.model import PalModel

logger = logging.getLogger(__name__)

FILE = "probe.json"

TIME = "time"
"""What `Picture.draw` gives to `set_gid` of the axes whose x are the seconds of the picture's clip. `probe.json` then
says of each picture under `axes` where they lie, `[{"left", "right", "top", "bottom", "start", "end"}, ...]`: the sides
as fractions of the picture's width and height from its upper left corner, and the seconds at the left and right side.
`pal report` moves a line along them while the clip plays."""

Row = Mapping[str, Any]
"""A line of a table: heading -> value. A value's interval stands right after it as `ci95`, or as `HEADING ci95`."""


@dataclass(frozen=True)
class Picture:
    """One picture, and what to see in it."""

    title: str
    caption: str
    """One or two sentences: how to read it."""
    draw: Callable[[Figure], None]
    """Draws into an empty matplotlib figure."""
    size: tuple[float, float] = (8.0, 4.5)
    """Width and height in inches."""
    clip: str | None = None
    """The name in `Finding.clips` of the sound that it shows."""


@dataclass(frozen=True)
class Finding:
    """What one probe says of one model."""

    probe: str
    """Its name on the command line."""
    model: Mapping[str, Any]
    """What `about` says of it."""
    settings: Mapping[str, Any]
    """All that decides the result beside the model."""
    reading: Sequence[str]
    """What the numbers say, a plain sentence each, most important first."""
    tables: Mapping[str, Sequence[Row]]
    """Title -> rows with the same headings."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Numbers too many for a table."""
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    """By name, which becomes the file's."""
    clips: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    """By name, which becomes the file's: samples [N] within -1..1, and their rate in Hz."""
    seconds: float = 0.0
    """That it took."""

    @cached_property
    def drawings(self) -> dict[str, tuple[bytes, list[dict[str, float]]]]:
        """What `drawn` makes of the pictures, by name; drawn once, and empty without matplotlib."""
        made = {name: drawn(picture) for name, picture in self.pictures.items()}
        return {name: one for name, one in made.items() if one is not None}

    def to_dict(self) -> dict[str, Any]:
        """What `probe.json` holds."""
        found: dict[str, Any] = jsonable(
            {
                "probe": self.probe,
                "model": dict(self.model),
                "settings": dict(self.settings),
                "reading": list(self.reading),
                "tables": {title: [dict(row) for row in rows] for title, rows in self.tables.items()},
                "pictures": [
                    {
                        "file": f"{name}.png",
                        "title": picture.title,
                        "caption": picture.caption,
                        "clip": None if picture.clip is None else f"{picture.clip}.wav",
                        "axes": self.drawings[name][1] if name in self.drawings else [],
                    }
                    for name, picture in self.pictures.items()
                ],
                "clips": [f"{name}.wav" for name in self.clips],
                "details": dict(self.details),
                "seconds": self.seconds,
                "pal_version": pal.__version__,
            }
        )
        return found

    def save(self, folder: Path) -> None:
        """Write the folder; an earlier finding of the same probe in it is replaced.

        Raises:
            ConfigError: the folder holds what another probe found.
        """
        if (folder / FILE).is_file():
            before = read(folder)
            if before["probe"] != self.probe:
                raise ConfigError(f"{folder} holds what 'pal probe {before['probe']}' found; give another --out")
            (folder / FILE).unlink()
            for old in (*(picture["file"] for picture in before["pictures"]), *before["clips"]):
                (folder / Path(old).name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (samples_N, rate) in self.clips.items():
            file = BytesIO()
            soundfile.write(file, samples_N.numpy(), rate, format="WAV", subtype="PCM_16")
            write_bytes(folder / f"{name}.wav", file.getvalue())
        for name, (png, _) in self.drawings.items():
            write_bytes(folder / f"{name}.png", png)
        write_json(folder / FILE, self.to_dict())


def drawn(picture: Picture) -> tuple[bytes, list[dict[str, float]]] | None:
    """The picture as PNG and its axes of `TIME`; None, with a line in the log, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no pictures: matplotlib is not installed (pip install 'pal-audio[plots]')")
        return None
    figure = Figure(figsize=picture.size, dpi=120, layout="constrained")
    picture.draw(figure)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue(), _time_axes(figure)


def _time_axes(figure: Figure) -> list[dict[str, float]]:
    """Of a figure that has been drawn, which is when its layout is known."""
    places = []
    for axes in figure.axes:
        if axes.get_gid() == TIME:
            box, (start, end) = axes.get_position(), axes.get_xlim()
            ends = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
            places.append({name: float(value) for name, value in {**ends, "start": start, "end": end}.items()})
    return places


def read(folder: Path) -> dict[str, Any]:
    """What `Finding.save` wrote. Raises BundleError where the folder holds none, or it is damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise BundleError(f"{folder}: no {FILE}; give a folder that pal probe wrote")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{path}: damaged; probe again") from None
    return found


def about(model: PalModel) -> dict[str, Any]:
    """What a finding says of its model."""
    return {
        "source": model.source,
        "digest": model.digest,
        "integration": dict(model.config.integration),
        "encoders": [dict(encoder) for encoder in model.config.encoders],
        "layers": model.llm.n_layers,
    }
