"""Output of the commands: JSON on stdout, notes on stderr, progress bars on terminals."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print JSON on stdout."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as in a file name that is not UTF-8
        text = json.dumps(value, indent=1)
    typer.echo(text)


def note(text: str) -> None:
    """Print a note as one line on stderr."""
    typer.echo(f"note: {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """The text with each run of white space replaced by one space."""
    return " ".join(text.split())


def shows_progress() -> bool:
    """True if stderr is a terminal."""
    return sys.stderr.isatty()
