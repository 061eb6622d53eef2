"""One page from any folders: what lies in them is found by its files, read, and shown chapter by chapter."""

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
from pal.lab.numbers import joined, size
from pal.report import cost, demo, evaluation, probe, training
from pal.report.embed import AUDIO_BYTES, PICTURE_BYTES, MediaEmbedder
from pal.report.page import Chapter, HtmlPage, Part, Points, Prose, Section, render

DEPTH = 3
"""Levels of folders below a given one that are searched."""


class FolderKind(Protocol):
    """A module that knows one kind of folder."""

    TITLE: str
    """Of its chapter."""
    UNDERSTANDS: str
    """What it takes, with the files by which it is known."""

    def find(self, path: Path) -> list[Path]:
        """What of its kind lies in a folder, not below; or the file itself, if it is one."""

    def read(self, path: Path) -> Any:
        """One of those that `find` found, checked. Raises PalError where it is damaged or not complete."""

    def chapter(
        self, found: Sequence[tuple[str, Any]], embed: MediaEmbedder
    ) -> tuple[list[Section], list[dict[str, Any]]]:
        """The sections on all that was read, by name, and a summary of each."""


KINDS = cast(list[FolderKind], [training, evaluation, cost, probe, demo])
"""In the order of the page."""
_BY_NEED = cast(list[FolderKind], [demo, probe, training, cost, evaluation])
"""In the order in which they take from the budget for sound: what is less without it comes first."""


@dataclass
class JoinedReport:
    """What went into a page."""

    out: str
    title: str
    bytes: int
    found: list[dict[str, Any]]
    """Each thing that was read: kind, name, path, and what its kind says of it."""
    faults: list[str]
    """What could not be read, or is not finished."""
    left_out: list[str] = field(default_factory=list)
    """Clips and pictures for which there was no room."""


def make(
    paths: Sequence[Path],
    out: Path,
    title: str | None = None,
    embed: MediaEmbedder | None = None,
    progress: bool = False,
) -> JoinedReport:
    """Write the page.

    Args:
        paths: folders, searched `DEPTH` levels deep, or single files of `pal eval --json` and `pal bench --json`.
        out: the page.
        title: of the page.
        embed: the room for clips and pictures, and where else clips may lie.
        progress: show a bar.

    Raises:
        ConfigError: a path with nothing in it that is understood; or nothing that can be read in any. Nothing is
            written then.
    """
    embed = embed or MediaEmbedder()
    found: dict[str, dict[Path, Path]] = {kind.TITLE: {} for kind in KINDS}
    for path in paths:
        of_path = {kind.TITLE: search(path, kind) for kind in KINDS}
        for of_kind, ones in of_path.items():
            for one in ones:
                found[of_kind].setdefault(one.resolve(), one)
        if not any(of_path.values()):
            raise ConfigError(f"{path}: nothing to report; understood are {joined([k.UNDERSTANDS for k in KINDS])}")
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
        raise ConfigError(f"nothing of it can be read: {faults[0]}")
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
    """What of a kind lies at a path and so many levels below it, sorted; each once, whatever links lead there.

    Raises:
        ConfigError: no such file or folder.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such folder")
    found = {one.resolve(): one for one in kind.find(path)}
    if path.is_dir() and depth:
        below = sorted(Path(one) for one in os.scandir(path) if one.is_dir() and not one.name.startswith("."))
        for folder in below:
            for one in search(folder, kind, depth - 1):
                found.setdefault(one.resolve(), one)
    return list(found.values())


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each path; a file that is called as its kind usually is goes by its folder."""
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
        lead += [Prose(f"Not everything could be read, or is finished ({len(faults)}):", "warning"), Points(faults)]
    if embed.left_out:
        room = f"{size(AUDIO_BYTES)} for sound and {size(PICTURE_BYTES)} for pictures"
        text = f"{len(embed.left_out)} clips or pictures are left out, each where it would stand: a page has {room}."
        lead.append(Prose(text, "warning"))
    return lead
