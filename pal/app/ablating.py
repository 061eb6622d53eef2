"""The command `pal ablate`: trains a grid of recipe variants and compares their answers to the same questions."""

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
            help="What to vary: integration, queries, connector, depth, stride, width or ffn; VALUES is a YAML list. "
            "Several axes give every combination; the first combination is the baseline.",
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each combination, with seeds 1, 2, ...")] = 3,
    on: Annotated[
        list[Path] | None,
        typer.Option("--on", metavar="MANIFEST", help="Manifest with the questions; default: synthetic scenes."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override one key of the recipe in all runs: stages.0.steps=50."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the runs; default: runs/ablate-NAME.", show_default=False),
    ] = None,
    limit: Limit = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the evaluation, in conversations.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Train variants of a recipe with shared seeds and compare them; an interrupted ablation resumes."""
    import logging

    from pal.probe import ablate as probe

    logging.basicConfig(format="%(message)s")
    logging.getLogger("pal").setLevel(logging.INFO)
    folder = out or Path("runs") / f"ablate-{recipe.stem}"
    try:
        result = probe.ablate(recipe, axes, folder, settings or [], seeds, on or [], limit, batch, shows_progress())
    except SystemExit:
        note("run the same command again to resume the ablation; it needs no --resume")
        raise
    finish(result, recipe.stem, folder, as_json)
    if result.details["errors"]:
        typer.echo(f"error: {result.details['errors']} answers raised an error and count as wrong", err=True)
        raise typer.Exit(1)
