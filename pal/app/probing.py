"""The commands `pal probe ...`: each takes a model, writes a folder of JSON and pictures, and says what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pal.app.output import print_json

if TYPE_CHECKING:
    from pal.probe.finding import Finding

probe_app = typer.Typer(no_args_is_help=True, help="Look inside a model: writes JSON and pictures.")

Model = Annotated[str, typer.Argument(help="Bundle folder or Hub id; 'tiny' ships with the package.")]
Manifests = Annotated[
    list[Path] | None, typer.Argument(help="Manifests to ask from; made-up scenes without any.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to write; runs/probe/PROBE-MODEL without.", show_default=False),
]
Limit = Annotated[int, typer.Option(min=1, help="Most questions of a manifest, taken evenly from all of it.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of what is made up or drawn.", show_default=False)]


def finish(finding: Finding, model: str, out: Path | None, as_json: bool) -> None:
    """Write the finding's folder and show it."""
    folder = out or Path("runs/probe") / f"{finding.probe}-{Path(model).name}"
    finding.save(folder)
    if as_json:
        print_json(finding.to_dict())
        return
    _print_tables(finding)
    for sentence in finding.reading:
        typer.echo(f"- {sentence}")
    typer.echo(f"{folder}: probe.json, {len(finding.pictures)} pictures, {finding.seconds:.0f} s")


def _print_tables(finding: Finding) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, rows in finding.tables.items():
        if not rows:
            continue
        table = Table(title=title)
        for place, heading in enumerate(rows[0]):
            table.add_column(heading.replace("_", " "), justify="right" if place else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        Console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return " to ".join(_cell(part) for part in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
