"""How commands speak: JSON on stdout, notes on stderr, progress where somebody looks."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer


def print_json(value: Any) -> None:
    """JSON on stdout."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as in the name of a file that is not UTF-8
        text = json.dumps(value, indent=1)
    typer.echo(text)


def note(text: str) -> None:
    """One line on stderr."""
    typer.echo(f"note: {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """The text with its white space joined."""
    return " ".join(text.split())


def shows_progress() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()
