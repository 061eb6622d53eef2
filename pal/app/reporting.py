"""The command `pal report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pal.app.options import AsJson
from pal.app.output import note, print_json, shows_progress


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Outputs of pal train, eval, bench, probe or demo, or folders with such outputs."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="DIR", help="Folder of the clips, if they have been moved; can be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about any runs: curves, scores, costs, pictures and sounds."""
    from pal.report.embed import MediaEmbedder
    from pal.report.join import make

    made = make(folders, out, title, MediaEmbedder(roots=data or []), progress=shows_progress())
    for fault in made.faults:
        note(fault)
    if made.left_out:
        note(f"{len(made.left_out)} clips or pictures are left out to keep the page small")
    if as_json:
        print_json(asdict(made))
    else:
        typer.echo(f"{out}: {len(made.found)} runs, {made.bytes:,} bytes")
    if made.faults:
        raise typer.Exit(1)
