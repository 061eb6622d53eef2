"""The command `pal ablate`: a grid of trainings, their answers to the same questions, a table and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pal.app.options import AsJson
from pal.app.output import note, shows_progress
from pal.app.probing import Limit, finish


def ablate(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    axes: Annotated[
        list[str],
        typer.Option(
            "--axis",
            metavar="NAME[=VALUES]",
            help="integration, queries, connector, depth, stride, width or ffn; VALUES is a YAML list. Several make "
            "every combination; the first is what the others are compared with.",
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell, with the seeds 1, 2, ...")] = 3,
    on: Annotated[
        list[Path] | None, typer.Option("--on", metavar="MANIFEST", help="Ask from it; made-up scenes without any.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value in all cells: stages.0.steps=50."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the runs; runs/ablate-NAME without.", show_default=False),
    ] = None,
    limit: Limit = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Conversations in a forward pass while evaluating.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Train a recipe's variants with shared seeds, compare them, and go on where it was stopped."""
    import logging

    from pal.probe import ablate as probe

    logging.basicConfig(format="%(message)s")
    logging.getLogger("pal").setLevel(logging.INFO)
    folder = out or Path("runs") / f"ablate-{recipe.stem}"
    try:
        finding = probe.ablate(recipe, axes, folder, settings or [], seeds, on or [], limit, batch, shows_progress())
    except SystemExit:
        note("the same command goes on from there, whatever the line above says of --resume")
        raise
    finish(finding, recipe.stem, folder, as_json)
    if finding.details["errors"]:
        typer.echo(f"error: {finding.details['errors']} answers raised and count as wrong", err=True)
        raise typer.Exit(1)
