"""The commands `pal eval` and `pal compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pal.app.options import AsJson, Exclude, Folds, Settings, Speakers
from pal.app.output import note, print_json, shows_progress

if TYPE_CHECKING:
    from pal.evaluate.compare import Comparison
    from pal.evaluate.result import Result
    from pal.evaluate.score import Score
    from pal.features import FeatureCache
    from pal.model import PalModel

_SHOWN = 5
"""Errors that are printed; the files hold all."""


def eval_(
    model: Annotated[
        str | None, typer.Argument(help="Bundle folder or Hub id; 'tiny' ships with the package.", show_default=False)
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Argument(help="A manifest file, or with --data a benchmark or data set.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Root of the manifest's paths, or the benchmark's folder.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run, which goes on where it was; benchmarks: runs/eval/..."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the score here; '-' prints it.")
    ] = None,
    scoring: Annotated[
        str | None,
        typer.Option(help="exact (generate and compare), rank (likelihood), official, or another rule's name."),
    ] = None,
    no_audio: Annotated[bool, typer.Option("--no-audio/--only-audio", help="The same model without audio too.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 32,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep here what the encoders make of each clip, for later runs.")
    ] = None,
    folds: Folds = None,
    speakers: Speakers = None,
    exclude: Exclude = None,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget another run in the folder.")] = False,
    rescore: Annotated[
        Path | None, typer.Option("--rescore", metavar="FOLDER", help="Score a run's answers again, without a model.")
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(
            "--join", metavar="FOLDER", help="Runs on different questions, as one in --out; give it for each."
        ),
    ] = None,
) -> None:
    """Score a model, with intervals and beside the same model without audio.

    Options of a benchmark go by --set KEY=VALUE, those of its rule by --set rule.KEY=VALUE.
    """
    from pal.app.benchmarks import TODAY, names, options_of, rule_of

    options = options_of(settings or [], folds=folds, speakers=speakers, exclude=exclude)
    rule = rule_of(options, scoring)
    if rescore is not None or join:
        if model is not None:
            raise typer.BadParameter("takes no model", param_hint="--rescore" if rescore else "--join")
        from pal.evaluate import run as runs

        if rescore is not None:
            rule = {"name": "official", **rule} if scoring == "official" else rule  # not the one of its last scoring
            _finish(runs.rescore(rescore, rule), rescore, json_file)
        elif out is None:
            raise typer.BadParameter("needs the folder to make: --out", param_hint="--join")
        else:
            _finish(runs.join(join or [], out, overwrite), out, json_file)
        return
    if model is None or benchmark is None:
        raise typer.BadParameter("give a model and a benchmark", param_hint="MODEL BENCHMARK")
    if out is None and scoring in (None, "exact", "rank") and (benchmark not in names() or benchmark in TODAY):
        _in_memory(model, benchmark, data, options, scoring or "exact", no_audio, limit, batch, cache, json_file)
        return
    from pal.app.benchmarks import open_for_run

    folder = out or Path("runs/eval") / f"{Path(benchmark).stem}-{Path(model).name}"
    with open_for_run(benchmark, data, options, rule) as opened:
        import pal
        from pal.evaluate.run import run

        loaded = pal.load(model)
        result = run(
            loaded,
            opened,
            folder,
            no_audio=no_audio,
            limit=limit,
            batch=batch,
            progress=shows_progress(),
            overwrite=overwrite,
            features=_cached(cache, loaded),
        )
    if result is not None:  # the first of several processes
        _finish(result, folder, json_file)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pal eval; the first is what the others face.")],
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same questions, with paired significance."""
    from pal.evaluate.compare import compare as compared

    found = compared(folders)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_comparison(found)


def _in_memory(
    model: str,
    benchmark: str,
    data: Path | None,
    options: dict[str, Any],
    scoring: str,
    no_audio: bool,
    limit: int | None,
    batch: int,
    cache: Path | None,
    json_file: Path | None,
) -> None:
    """A manifest, or a data set's: all turns, one file at the end."""
    from pal.app.benchmarks import open_benchmark

    with open_benchmark(benchmark, data, options) as manifest:
        import pal
        from pal.evaluate import evaluate

        loaded = pal.load(model)
        score = evaluate(
            loaded,
            manifest,
            scoring=scoring,  # type: ignore[arg-type]
            no_audio=no_audio,
            limit=limit,
            batch=batch,
            progress=shows_progress(),
            benchmark=Path(benchmark).stem,
            features=_cached(cache, loaded),
            options=options,
        )
    if json_file is not None and str(json_file) == "-":
        print_json(score.to_dict())
    else:
        if json_file is not None:
            score.save(json_file)
        _print_score(score)
    if score.errors:
        raise typer.Exit(1)


def _cached(folder: Path | None, model: PalModel) -> FeatureCache | None:
    from pal.features import FeatureCache

    return None if folder is None else FeatureCache(folder, model.ears)


def _finish(result: Result, folder: Path, json_file: Path | None) -> None:
    from pal.evaluate.score import jsonable, write_json

    if json_file is not None and str(json_file) == "-":
        print_json(jsonable(result.to_dict()))
    else:
        if json_file is not None:
            write_json(json_file, result.to_dict())
        _print_result(result, folder)
    if result.errors:
        raise typer.Exit(1)


def _print_result(result: Result, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.benchmark}: {result.n} questions")
    table.add_column("figure")
    for heading in ("score", "95 % interval", "no audio"):
        table.add_column(heading, justify="right")
    for name, figure in result.figures.items():
        table.add_row(name, _number(figure.score), _interval(figure.ci95), _number(figure.no_audio_score))
    for name, pair in result.single.items():
        table.add_row(name, _number(pair["score"]), "", _number(pair["no_audio_score"]))
    for axis, values in result.categories.items():
        for value, part in values.items():
            cells = (_number(part["score"]), _interval(part["ci95"]), _number(part["no_audio_score"]))
            table.add_row(f"  {axis}: {value} ({part['n']})", *cells)
    Console().print(table)
    for what, why in result.facts.get("not_computed", {}).items():
        note(f"no {what}: {why}")
    _print_errors([f"{error['id']}: {error['error']}" for error in result.errors])
    typer.echo(f"{folder}: {result.metric} {_number(result.overall.score)}, {len(result.errors)} errors")


def _print_score(score: Score) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{score.benchmark}: {score.metric}, {score.overall.n} questions")
    table.add_column("task")
    for heading in ("n", "score", "95 % interval", "no audio"):
        table.add_column(heading, justify="right")
    for task, accuracy in [*score.per_task.items(), ("all", score.overall)]:
        cells = (_number(accuracy.score), _interval(accuracy.ci95), _number(accuracy.no_audio_score))
        table.add_row(task, str(accuracy.n), *cells)
    Console().print(table)
    _print_errors([f"{item.id}: {item.error or item.no_audio_error}" for item in score.errors])


def _print_comparison(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.benchmark}: {found.metric}, {found.n} questions")
    table.add_column("run")
    for heading in ("score", "95 % interval", "difference", "95 % interval", "p, bootstrap", "p, McNemar"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        cells = (_number(row.difference), _interval(row.difference_ci95), _chance(row.p_bootstrap))
        table.add_row(row.folder, _number(row.score), _interval(row.ci95), *cells, _chance(row.p_mcnemar))
    Console().print(table)


def _print_errors(lines: Sequence[str]) -> None:
    for line in lines[:_SHOWN]:
        note(f"wrong because it raised: {line}")
    if len(lines) > _SHOWN:
        note(f"and {len(lines) - _SHOWN} more that raised")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _chance(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
