"""Elements of a page, and their rendering as one HTML file by the template in `look/`."""

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
    """Paragraph."""

    kind: ClassVar = "prose"
    text: str
    style: str = "caption"
    """caption, lead or warning."""


@dataclass(frozen=True)
class Points:
    """Bullet list."""

    kind: ClassVar = "points"
    points: Sequence[str]


@dataclass(frozen=True)
class TableCell:
    """Table cell, optionally marked as a right or wrong answer."""

    text: str
    mark: str = ""
    """right, wrong, or "" for no mark."""


@dataclass(frozen=True)
class Table:
    """Table; the first cell of a row is its heading."""

    kind: ClassVar = "table"
    caption: str
    """Caption above the table."""
    headings: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str | TableCell]]]]
    """(title, rows); a title of "" is not shown."""
    words: bool = False
    """True for cells with text, which are wrapped and aligned left."""

    @classmethod
    def of(cls, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> Table:
        """A table without groups."""
        return cls(caption, headings, [("", rows)], words)


@dataclass(frozen=True)
class Sound:
    """Audio player, or the reason why there is none."""

    kind: ClassVar = "sound"
    name: str
    source: str | None
    """Data URI of the clip."""
    missing: str = ""
    """Reason for a missing source."""


@dataclass(frozen=True)
class TimeAxis:
    """Area of a picture with time from left to right, over which a cursor follows the sound.

    Its sides are fractions of the picture's width and height, from the upper left corner.
    """

    left: float
    right: float
    top: float
    bottom: float
    start: float
    """Time at the left side, in seconds."""
    end: float
    """Time at the right side, in seconds."""


@dataclass(frozen=True)
class PagePicture:
    """Picture with caption, optionally with the sound that it shows."""

    kind: ClassVar = "picture"
    alt: str
    source: str | None = None
    """Data URI of the picture."""
    missing: str = ""
    """Reason for a missing source."""
    title: str = ""
    caption: str = ""
    sound: Sound | None = None
    time: Sequence[TimeAxis] = ()

    @property
    def axes(self) -> list[dict[str, float]]:
        """Time axes as dictionaries, for the script."""
        return [asdict(axis) for axis in self.time]


@dataclass(frozen=True)
class ResultCard:
    """Card with a headline number."""

    title: str
    colour: str
    """Colour of the card, as in the plots."""
    value: str
    note: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    """Row of cards."""

    kind: ClassVar = "cards"
    cards: Sequence[ResultCard]


@dataclass(frozen=True)
class AnsweredQuestion:
    """Question about clips, with its answers."""

    kind: ClassVar = "question"
    text: str
    sounds: Sequence[Sound]
    truth: str
    answers: Sequence[tuple[str, TableCell]]
    """(name of the model, answer)."""


@dataclass(frozen=True)
class Fold:
    """Collapsed section."""

    kind: ClassVar = "fold"
    title: str
    parts: Sequence[Part]


Part = Prose | Points | Table | Sound | PagePicture | Cards | AnsweredQuestion | Fold


@dataclass(frozen=True)
class Section:
    """Section with a heading."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Chapter:
    """Chapter of a page; without a title, its sections have no heading above them."""

    title: str
    sections: Sequence[Section]


@dataclass(frozen=True)
class HtmlPage:
    """HTML page."""

    title: str
    heading: str
    lead: Sequence[Part]
    chapters: Sequence[Chapter]
    footer: str
    contents: bool = False
    """True for a table of contents at the top."""
    script: str = field(default_factory=lambda: (_LOOK / "script.js").read_text(encoding="utf-8"))


def render(page: HtmlPage) -> str:
    """Render as HTML. All text is escaped, and a content security policy blocks other scripts and all requests."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    look = Environment(
        loader=FileSystemLoader(_LOOK), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    return look.get_template("page.html").render(page=page, script_digest=digest).lstrip()
