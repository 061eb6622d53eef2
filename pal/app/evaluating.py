"""The commands `pal eval` and `pal compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pal.app.options import AsJson, Exclude, Folds, Settings, Speakers
from pal.app.output import note, print_json, shows_progress

if TYPE_CHECKING:
    from pal.evaluate.compare import Comparison
    from pal.evaluate.result import MetricValue, Result
    from pal.features import FeatureCache
    from pal.model import PalModel

_SHOWN = 5
"""Number of errors to print; the files hold all."""


def eval_(
    model: Annotated[
        str | None,
        typer.Argument(help="Bundle folder or Hub id; 'tiny' and 'smol' ship with the package.", show_default=False),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Argument(
            help="A manifest file, or the name of a benchmark or data set (needs --data).", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Folder of the benchmark or data set, or base folder of the manifest's audio paths."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Run folder; an interrupted run resumes. Default: runs/eval/... for benchmarks, else none.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="File for score and answers; '-' prints them."),
    ] = None,
    scoring: Annotated[
        str | None,
        typer.Option(
            help="Scoring rule: exact (generate and compare), rank (by likelihood), official, or another rule's name."
        ),
    ] = None,
    no_audio: Annotated[
        bool, typer.Option("--no-audio/--only-audio", help="Also evaluate the same model without audio.")
    ] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of questions to evaluate, from the first on.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size: rows of a forward pass.")] = 32,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to cache encoder features of clips, for later runs.")
    ] = None,
    folds: Folds = None,
    speakers: Speakers = None,
    exclude: Exclude = None,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete another run in the folder.")] = False,
    rescore: Annotated[
        Path | None,
        typer.Option("--rescore", metavar="FOLDER", help="Score the answers of a run again, without the model."),
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(
            "--join", metavar="FOLDER", help="Join runs on different questions into --out; give it once for each run."
        ),
    ] = None,
) -> None:
    """Evaluate a model, with confidence intervals and the baseline without audio.

    Set options of a benchmark by --set KEY=VALUE, those of its scoring rule by --set rule.KEY=VALUE.
    """
    from pal.app.benchmarks import names, open_benchmark, options_of, rule_of

    options = options_of(settings or [], folds=folds, speakers=speakers, exclude=exclude)
    rule = rule_of(options, scoring)
    if rescore is not None or join:
        if model is not None:
            raise typer.BadParameter("takes no model", param_hint="--rescore" if rescore else "--join")
        from pal.evaluate import rescoring

        if rescore is not None:
            rule = {"name": "official", **rule} if scoring == "official" else rule  # instead of the last rule used
            _finish(rescoring.rescore(rescore, rule), str(rescore), json_file)
        elif out is None:
            raise typer.BadParameter("needs a folder to write: --out", param_hint="--join")
        else:
            _finish(rescoring.join(join or [], out, overwrite), str(out), json_file)
        return
    if model is None or benchmark is None:
        raise typer.BadParameter("give a model and a benchmark", param_hint="MODEL BENCHMARK")
    if out is None and benchmark in names():  # published benchmarks take hours, so a kill must lose nothing
        out = Path("runs/eval") / f"{benchmark}-{Path(model).name}"
    with open_benchmark(benchmark, data, options, rule) as opened:
        import pal
        from pal.evaluate import evaluate

        loaded = pal.load(model)
        result = evaluate(
            loaded,
            opened,
            out,
            no_audio=no_audio,
            limit=limit,
            batch=batch,
            progress=shows_progress(),
            features=_cached(cache, loaded),
            overwrite=overwrite,
        )
    if result is not None:  # None in all processes but the first
        _finish(result, str(out or benchmark), json_file)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders or --json files of pal eval; the first is the baseline.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same questions, with paired significance tests."""
    from pal.evaluate.compare import compare as compared

    found = compared(folders)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_comparison(found)


def _cached(folder: Path | None, model: PalModel) -> FeatureCache | None:
    from pal.features import FeatureCache

    return None if folder is None else FeatureCache(folder, model.ears)


def _finish(result: Result, where: str, json_file: Path | None) -> None:
    """Print and save the result, and exit with status 1 if a question raised an error.

    `where` names the run in the last line: its folder or its benchmark.
    """
    if json_file is not None and str(json_file) == "-":
        print_json(result.to_dict())
    else:
        if json_file is not None:
            result.save(json_file)
        _print_result(result, where)
    if result.errors:
        raise typer.Exit(1)


def _print_result(result: Result, where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.benchmark}: {result.n} questions")
    table.add_column("metric")
    for heading in ("score", "95 % interval", "no audio"):
        table.add_column(heading, justify="right")
    for name, value in result.metrics.items():
        table.add_row(name, *_cells(value))
    for name, pair in result.single.items():
        table.add_row(name, _number(pair["score"]), "", _number(pair["no_audio_score"]))
    for axis, parts in result.categories.items():
        for name, part in parts.items():
            table.add_row(f"  {axis}: {name} ({part.n})", *_cells(part))
    Console().print(table)
    for metric, why in result.facts.get("not_computed", {}).items():
        note(f"no {metric}: {why}")
    _print_errors([f"{error['id']}: {error['error']}" for error in result.errors])
    typer.echo(f"{where}: {result.metric} {_number(result.score)}, {len(result.errors)} errors")


def _cells(value: MetricValue) -> tuple[str, str, str]:
    return _number(value.score), _interval(value.ci95), _number(value.no_audio_score)


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
        note(f"counts as wrong because of an error: {line}")
    if len(lines) > _SHOWN:
        note(f"and {len(lines) - _SHOWN} more errors")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _chance(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
