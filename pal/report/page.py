"""What a page is made of, and how it becomes one HTML file. How that looks is in `look/`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

_LOOK = Path(__file__).parent / "look"


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar = "prose"
    text: str
    style: str = "caption"
    """caption, lead or warning."""


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar = "points"
    points: Sequence[str]


@dataclass(frozen=True)
class TableCell:
    """A table's cell whose answer was right or wrong."""

    text: str
    mark: str = ""
    """right, wrong or nothing."""


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row is its heading."""

    kind: ClassVar = "table"
    caption: str
    """What it holds; shown above it."""
    headings: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str | TableCell]]]]
    """(title, rows); a title of "" is not shown."""
    words: bool = False
    """Its cells are sentences, so they are broken into lines and stand left."""

    @classmethod
    def of(cls, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> Table:
        """A table without groups."""
        return cls(caption, headings, [("", rows)], words)


@dataclass(frozen=True)
class Sound:
    """A clip to play, or why it cannot be played here."""

    kind: ClassVar = "sound"
    name: str
    source: str | None
    """A data URI."""
    missing: str = ""


@dataclass(frozen=True)
class TimeAxis:
    """Where in a picture seconds run from left to right, so that a line can follow the sound.

    The sides are fractions of the picture's width and height, from its upper left corner.
    """

    left: float
    right: float
    top: float
    bottom: float
    start: float
    """Second of the sound at the left side."""
    end: float


@dataclass(frozen=True)
class PagePicture:
    """A picture, maybe with the sound that it shows."""

    kind: ClassVar = "picture"
    alt: str
    source: str | None = None
    """A data URI."""
    missing: str = ""
    """Why there is none."""
    title: str = ""
    caption: str = ""
    sound: Sound | None = None
    time: Sequence[TimeAxis] = ()

    @property
    def axes(self) -> list[dict[str, float]]:
        """For the script."""
        return [asdict(axis) for axis in self.time]


@dataclass(frozen=True)
class ResultCard:
    """One subject's headline."""

    title: str
    colour: str
    """Its colour in the plots."""
    value: str
    note: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    """Headlines beside each other."""

    kind: ClassVar = "cards"
    cards: Sequence[ResultCard]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question about clips, and what was answered."""

    kind: ClassVar = "question"
    text: str
    sounds: Sequence[Sound]
    truth: str
    answers: Sequence[tuple[str, TableCell]]
    """(who, what)."""


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    kind: ClassVar = "fold"
    title: str
    parts: Sequence[Part]


Part = Prose | Points | Table | Sound | PagePicture | Cards | AnsweredQuestion | Fold


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Chapter:
    """Sections of one kind; a page of one chapter without a title shows no chapters."""

    title: str
    sections: Sequence[Section]


@dataclass(frozen=True)
class HtmlPage:
    """All of it."""

    title: str
    heading: str
    lead: Sequence[Part]
    chapters: Sequence[Chapter]
    footer: str
    contents: bool = False
    """Whether it begins with a table of contents."""
    script: str = field(default_factory=lambda: (_LOOK / "script.js").read_text(encoding="utf-8"))


def render(page: HtmlPage) -> str:
    """The HTML. All text is escaped, and a content security policy keeps browsers from fetching or running more."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    look = Environment(
        loader=FileSystemLoader(_LOOK), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    return look.get_template("page.html").render(page=page, script_digest=digest).lstrip()
