"""Result of a probe, and its output folder.

| file | content |
|---|---|
| `probe.json` | all numbers; written last, so that it exists if and only if the folder is complete |
| `*.png` | pictures, if matplotlib is installed |
| `*.wav` | example clips |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
from torch import Tensor

import pal
from pal.errors import BundleError, ConfigError
from pal.files import jsonable, write_bytes, write_json
from pal.plots import Draw, Rendered, render

if TYPE_CHECKING:
    from pal.model import PalModel

FILE = "probe.json"

TableRow = Mapping[str, Any]
"""Row of a table: heading -> value. The interval of a value follows it as `ci95`, or has the key `HEADING ci95`."""


@dataclass(frozen=True)
class Plot:
    """Plot with its caption."""

    title: str
    caption: str
    """Explanation of the plot, in one or two sentences."""
    draw: Draw
    size: tuple[float, float] = (8.0, 4.5)
    """Width and height in inches."""
    clip: str | None = None
    """Name in `ProbeResult.clips` of the sound that it shows. On a report page, a cursor moves along its axes
    `pal.plots.TIME` while the clip plays."""


@dataclass(frozen=True)
class ProbeResult:
    """Result of one probe."""

    probe: str
    """Name of the probe on the command line."""
    model: Mapping[str, Any]
    """Facts about the model, from `about`."""
    settings: Mapping[str, Any]
    """Settings that determine the result, apart from the model."""
    reading: Sequence[str]
    """Conclusions from the numbers, one sentence each, most important first."""
    tables: Mapping[str, Sequence[TableRow]]
    """Title -> rows with the same headings."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, without a table."""
    pictures: Mapping[str, Plot] = field(default_factory=dict)
    """File name without suffix -> plot."""
    clips: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    """File name without suffix -> (samples [N] within -1..1, sampling rate in Hz)."""
    seconds: float = 0.0
    """Run time."""

    @cached_property
    def rendered(self) -> dict[str, Rendered]:
        """Rendered pictures by name; empty without matplotlib."""
        made = {name: render(plot.draw, plot.size) for name, plot in self.pictures.items()}
        return {name: one for name, one in made.items() if one is not None}

    def to_dict(self) -> dict[str, Any]:
        """Content of `probe.json`."""
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
                        "title": plot.title,
                        "caption": plot.caption,
                        "clip": None if plot.clip is None else f"{plot.clip}.wav",
                        "axes": self.rendered[name].time_axes if name in self.rendered else [],
                    }
                    for name, plot in self.pictures.items()
                ],
                "clips": [f"{name}.wav" for name in self.clips],
                "details": dict(self.details),
                "seconds": self.seconds,
                "pal_version": pal.__version__,
            }
        )
        return found

    def save(self, folder: Path) -> None:
        """Write the output folder; replaces an earlier result of the same probe.

        Raises:
            ConfigError: the folder holds another probe's result.
        """
        if (folder / FILE).is_file():
            before = read(folder)
            if before["probe"] != self.probe:
                raise ConfigError(f"{folder} holds a result of 'pal probe {before['probe']}'; give another --out")
            (folder / FILE).unlink()
            for old in (*(picture["file"] for picture in before["pictures"]), *before["clips"]):
                (folder / Path(old).name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (samples_N, rate) in self.clips.items():
            file = BytesIO()
            soundfile.write(file, samples_N.numpy(), rate, format="WAV", subtype="PCM_16")
            write_bytes(folder / f"{name}.wav", file.getvalue())
        for name, one in self.rendered.items():
            write_bytes(folder / f"{name}.png", one.png)
        write_json(folder / FILE, self.to_dict())


def read(folder: Path) -> dict[str, Any]:
    """Content of a saved `probe.json`. Raises BundleError if it is missing or damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise BundleError(f"{folder}: no {FILE}; give a folder that pal probe wrote")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{path}: damaged; run the probe again") from None
    return found


def about(model: PalModel) -> dict[str, Any]:
    """Facts about a model for `probe.json`."""
    return {
        "source": model.source,
        "digest": model.digest,
        "integration": dict(model.config.integration),
        "encoders": [dict(encoder) for encoder in model.config.encoders],
        "layers": model.llm.n_layers,
    }
