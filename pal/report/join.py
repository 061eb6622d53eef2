"""Joint report: finds runs of all kinds in folders by their files, reads them, and writes one page."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast

from tqdm import tqdm

import pal
from pal.errors import ConfigError, PalError
from pal.files import write_text
from pal.lab.names import distinct_names
from pal.lab.numbers import format_bytes, joined
from pal.report import cost, demo, evaluation, probe, training
from pal.report.embed import AUDIO_BYTES, PICTURE_BYTES, MediaEmbedder
from pal.report.page import Chapter, HtmlPage, Part, Points, Prose, Section, render

DEPTH = 3
"""Number of folder levels searched below a given folder."""


class FolderKind(Protocol):
    """Module that reads one kind of run folder."""

    TITLE: str
    """Title of its chapter."""
    DESCRIPTION: str
    """Description of the kind, with the files that identify it, for error messages."""

    def find(self, path: Path) -> list[Path]:
        """Paths of this kind directly in a folder; or the path itself, if it is a file or folder of this kind."""

    def read(self, path: Path) -> Any:
        """Read and validate a path from `find`. Raises PalError if it is damaged or incomplete."""

    def chapter(
        self, found: Sequence[tuple[str, Any]], embed: MediaEmbedder
    ) -> tuple[list[Section], list[dict[str, Any]]]:
        """Sections on all results of this kind, given by name, and a summary of each result."""


KINDS = cast(list[FolderKind], [training, evaluation, cost, probe, demo])
"""All kinds, in the order of the page."""
_BY_NEED = cast(list[FolderKind], [demo, probe, training, cost, evaluation])
"""All kinds, in the order in which they use the budget for sound: those that need sound most come first."""


@dataclass
class JoinedReport:
    """Summary of a written page."""

    out: str
    title: str
    bytes: int
    found: list[dict[str, Any]]
    """For each result on the page: kind, name, path, and the summary by its kind."""
    faults: list[str]
    """Messages about results that are unreadable or unfinished."""
    left_out: list[str] = field(default_factory=list)
    """Clips and pictures beyond the size budget."""


def make(
    paths: Sequence[Path],
    out: Path,
    title: str | None = None,
    embed: MediaEmbedder | None = None,
    progress: bool = False,
) -> JoinedReport:
    """Write a report on all runs in some folders.

    Args:
        paths: folders, searched `DEPTH` levels deep, or single files of `pal eval --json` and `pal bench --json`.
        out: HTML file to write.
        title: title of the page; default: from the names of `paths`.
        embed: embeds clips and pictures; sets their budget, and folders to search for moved clips.
        progress: show a progress bar.

    Raises:
        ConfigError: a path holds no run of any kind, or no run can be read; nothing is written.
    """
    embed = embed or MediaEmbedder()
    found: dict[str, dict[Path, Path]] = {kind.TITLE: {} for kind in KINDS}
    for path in paths:
        of_path = {kind.TITLE: search(path, kind) for kind in KINDS}
        for of_kind, ones in of_path.items():
            for one in ones:
                found[of_kind].setdefault(one.resolve(), one)
        if not any(of_path.values()):
            raise ConfigError(f"{path}: nothing to report; known kinds: {joined([k.DESCRIPTION for k in KINDS])}")
    faults: list[str] = []
    chapters: dict[str, Chapter] = {}
    facts: list[dict[str, Any]] = []
    with tqdm(
        total=sum(map(len, found.values())), desc="report", delay=2, disable=None if progress else True, file=sys.stderr
    ) as bar:
        for kind in _BY_NEED:
            readable = _readable(kind, list(found[kind.TITLE].values()), faults, bar)
            if not readable:
                continue
            names = labels(list(readable))
            named = list(zip(names, readable.values(), strict=True))
            sections, summaries = kind.chapter(named, embed)
            chapters[kind.TITLE] = Chapter(kind.TITLE, sections)
            for name, path, summary in zip(names, readable, summaries, strict=True):
                facts.append({"kind": kind.TITLE, "name": name, "path": str(path), **summary})
    faults += embed.damaged
    if not chapters:
        raise ConfigError(f"no run can be read: {faults[0]}")
    title = title or (f"Report on {joined([path.resolve().name for path in paths])}" if len(paths) <= 3 else "Report")
    page = HtmlPage(
        title=title,
        heading=title,
        lead=_lead(faults, embed),
        chapters=[chapters[kind.TITLE] for kind in KINDS if kind.TITLE in chapters],
        footer=f"pal {pal.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        contents=True,
    )
    text = render(page)
    write_text(out, text)
    order = [kind.TITLE for kind in KINDS]
    facts.sort(key=lambda one: order.index(one["kind"]))
    return JoinedReport(str(out), title, len(text.encode()), facts, faults, embed.left_out)


def search(path: Path, kind: FolderKind, depth: int = DEPTH) -> list[Path]:
    """Paths of one kind at a path and up to `depth` levels below it, sorted, without duplicates through links.

    Raises:
        ConfigError: no such file or folder.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    found = {one.resolve(): one for one in kind.find(path)}
    if path.is_dir() and depth:
        below = sorted(Path(one) for one in os.scandir(path) if one.is_dir() and not one.name.startswith("."))
        for folder in below:
            for one in search(folder, kind, depth - 1):
                found.setdefault(one.resolve(), one)
    return list(found.values())


def labels(paths: Sequence[Path]) -> list[str]:
    """Distinct names of paths; a file with the usual name of its kind has the name of its folder."""
    usual = ("score.json", "bench.json")
    named = (path.parent if path.name in usual else path.with_suffix("") if path.is_file() else path for path in paths)
    return distinct_names([path.resolve() for path in named])


def _readable(kind: FolderKind, paths: Sequence[Path], faults: list[str], bar: tqdm[Any]) -> dict[Path, Any]:
    found = {}
    for path in paths:
        try:
            found[path] = kind.read(path)
            fault = getattr(found[path], "fault", None)
            if fault is not None:
                faults.append(fault)
        except PalError as error:
            faults.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            faults.append(f"{path}: damaged, or written by another version of pal; write it again")
        bar.update()
    return found


def _lead(faults: Sequence[str], embed: MediaEmbedder) -> list[Part]:
    lead: list[Part] = []
    if faults:
        lead += [Prose(f"Some runs are unreadable or unfinished ({len(faults)}):", "warning"), Points(faults)]
    if embed.left_out:
        budget = f"{format_bytes(AUDIO_BYTES)} of sound and {format_bytes(PICTURE_BYTES)} of pictures"
        text = f"{len(embed.left_out)} clips or pictures are left out, with a note in their place: a page has {budget}."
        lead.append(Prose(text, "warning"))
    return lead
