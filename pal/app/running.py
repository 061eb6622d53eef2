"""`pal runs`: lists and compares training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pal.app.options import AsJson
from pal.app.output import note, print_json

if TYPE_CHECKING:
    from pal.report.runs import Runs


def runs(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="A folder with run folders; or several, to compare them.")
    ],
    curves: Annotated[
        Path | None, typer.Option("--curves", metavar="FILE.png", help="Draw the losses of all runs into one picture.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the training runs below a folder; with several folders, also where their recipes and scores differ."""
    from pal.report.runs import find_runs

    if curves is not None and curves.suffix != ".png":
        raise typer.BadParameter(f"'{curves}' must end in .png", param_hint="--curves")
    found = find_runs(folders)
    if curves is not None:
        found.draw(curves)
    if as_json:
        print_json({**found.to_dict(), "curves": None if curves is None else str(curves)})
        return
    _print_runs(found)
    if len(folders) > 1:
        _print_comparison(found)
    if curves is not None:
        typer.echo(f"curves: {curves}")
    for one in found.summaries:
        for reason in one.reasons:
            note(f"{one.path}: {reason.removeprefix(f'{one.path}: ')}")


def _print_runs(found: Runs) -> None:
    from pal.lab.numbers import format_value, three_digits

    rows = []
    for one in found.summaries:
        if one.name not in found.read:
            rows.append([one.name, "unusable", *[""] * 6])
            continue
        scores = "; ".join(f"{name} {score:.3f}" for name, score in one.scores.items())
        cells = [f"{one.steps:,}", format_value(one.loss), format_value(one.validation_accuracy)]
        cells += [three_digits(one.seconds), one.device, scores]
        rows.append([one.name, "finished" if one.finished else "unfinished", *cells])
    if not rows:
        typer.echo("no run folder")
        return
    _print_table(["run", "state", "steps", "loss", "validation accuracy", "seconds", "device", "scores"], rows)


def _print_comparison(found: Runs) -> None:
    names = list(found.read)
    settings = found.differences()
    typer.echo("")
    if settings:
        _print_table(["setting", *names], [[key, *values.values()] for key, values in settings.items()])
    else:
        typer.echo("recipes: no difference")
    scores = found.scores()
    if scores:
        typer.echo("")
        rows = [[key, *(f"{of[name]:.3f}" if name in of else "" for name in names)] for key, of in scores.items()]
        _print_table(["score", *names], rows)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, without those that are empty."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
