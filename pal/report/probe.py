"""Sections on results of `pal probe ...`: sentences, tables, pictures, and their clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal.lab.numbers import format_value
from pal.probe import probe_result
from pal.report.embed import MediaEmbedder
from pal.report.page import Fold, PagePicture, Part, Points, Prose, Section, Table, TimeAxis

TITLE = "Probes"
DESCRIPTION = f"probes ({probe_result.FILE})"


@dataclass(frozen=True)
class ProbePart:
    """Validated result of one probe."""

    folder: Path
    name: str
    model: Mapping[str, Any]
    reading: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[tuple[Mapping[str, Any], Sequence[TimeAxis]]]
    clips: Sequence[str]
    settings: Sequence[tuple[str, str]]
    seconds: float


def find(path: Path) -> list[Path]:
    """The folder, if it holds the result of a probe."""
    return [path] if (path / probe_result.FILE).is_file() else []


def read(path: Path) -> ProbePart:
    """Read a folder of `ProbeResult.save`. Raises BundleError if it is damaged."""
    found = probe_result.read(path)
    return ProbePart(
        folder=path,
        name=found["probe"],
        model=found["model"],
        reading=[str(sentence) for sentence in found["reading"]],
        tables=[_table(title, rows) for title, rows in found["tables"].items() if rows],
        pictures=[
            ({key: one[key] for key in ("file", "title", "caption", "clip")}, _axes(one.get("axes", ())))
            for one in found["pictures"]
        ],
        clips=[Path(name).name for name in found["clips"]],
        settings=[
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in found["settings"].items()
        ],
        seconds=float(found["seconds"]),
    )


def chapter(found: Sequence[tuple[str, ProbePart]], embed: MediaEmbedder) -> tuple[list[Section], list[dict[str, Any]]]:
    """One section for each result."""
    sections, facts = [], []
    for name, probe in found:
        sections.append(Section(name if probe.name in name else f"{probe.name}: {name}", _parts(probe, embed)))
        facts.append({"probe": probe.name, "model": dict(probe.model), "reading": list(probe.reading)})
    return sections, facts


def _parts(probe: ProbePart, embed: MediaEmbedder) -> list[Part]:
    parts: list[Part] = [Points(probe.reading)]
    shown = set()
    for picture, axes in probe.pictures:
        source, missing = embed.picture(probe.folder / Path(picture["file"]).name)
        clip = picture["clip"] and Path(picture["clip"]).name
        shown.add(clip)
        parts.append(
            PagePicture(
                alt=f"{picture['title']}. {picture['caption']}",
                source=source,
                missing=missing,
                title=picture["title"],
                caption=picture["caption"],
                sound=embed.sound(probe.folder / clip) if clip else None,
                time=axes,
            )
        )
    parts += [embed.sound(probe.folder / clip) for clip in probe.clips if clip not in shown]
    parts += probe.tables
    about = Table.of("Settings that determine the result", ["setting", "value"], probe.settings, words=True)
    source = f"Model {probe.model.get('source')}, {str(probe.model.get('digest'))[:12]}; {probe.seconds:.0f} seconds."
    return [*parts, Fold("Settings", [Prose(source), about])]


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    headings = list(rows[0])
    cells = [[format_value(row[heading]) for heading in headings] for row in rows]
    return Table.of(title, [heading.replace("_", " ") for heading in headings], cells)


def _axes(places: Sequence[Mapping[str, float]]) -> list[TimeAxis]:
    return [TimeAxis(**place) for place in places]
