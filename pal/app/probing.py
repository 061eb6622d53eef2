"""The commands `pal probe ...`: each takes a model, prints a result, and writes it as a folder of JSON and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pal.app.options import AsJson
from pal.app.output import print_json, shows_progress

if TYPE_CHECKING:
    from pal.data.manifest import Record
    from pal.model import PalModel
    from pal.probe.probe_result import ProbeResult

probe_app = typer.Typer(no_args_is_help=True, help="Analyse a model; writes JSON and pictures.")

Model = Annotated[str, typer.Argument(help="Bundle folder or Hub id; 'tiny' and 'smol' ship with the package.")]
Manifests = Annotated[
    list[Path] | None,
    typer.Argument(help="Manifests with the questions; default: synthetic scenes.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to write; default: runs/probe/PROBE-MODEL.", show_default=False),
]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of records of a manifest, spread evenly over it.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size: rows of a forward pass.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Seed of synthetic data and bootstrap samples.", show_default=False)
]


@probe_app.command("attention")
def attention(
    model: Model,
    manifests: Manifests = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", help="Ask about this clip instead of manifests.", show_default=False)
    ] = None,
    question: Annotated[str | None, typer.Option("--ask", help="Question about --audio.", show_default=False)] = None,
    limit: Limit = 128,
    examples: Annotated[int, typer.Option(min=0, help="Number of clips shown as heat-maps.")] = 3,
    batch: Batch = 16,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure attention to audio, by layer, head, pathway, word and second."""
    import pal
    from pal.data.manifest import Record, Turn
    from pal.probe.attention_mass import probe_attention

    if (audio is None) != (question is None):
        raise typer.BadParameter("give both or neither", param_hint="--audio --ask")
    if audio is not None and manifests:
        raise typer.BadParameter("cannot be combined with manifests", param_hint="--audio")
    options: Any = {"examples": examples, "batch": batch, "progress": shows_progress()}
    if audio is not None and question is not None:
        one = Record("audio", (str(audio),), (Turn(question, ""),), task="", dataset="")
        result = probe_attention(pal.load(model), [one], settings={"audio": str(audio)}, **options)
    else:
        with _opened(model, manifests, limit, seed) as (loaded, records, settings):
            result = probe_attention(loaded, records, settings=settings, **options)
    finish(result, model, out, as_json)


@probe_app.command("health")
def health(
    model: Model,
    manifests: Manifests = None,
    limit: Limit = 200,
    batch: Batch = 32,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Check for common faults of audio LLMs, with a remedy for each; exit status 1 if there is one."""
    from pal.probe.health import probe_health

    with _opened(model, manifests, limit, seed) as (loaded, records, _):
        result = probe_health(loaded, records, batch, progress=shows_progress())
    finish(result, model, out, as_json)
    if any(row["status"] == "fault" for row in result.tables["checks"]):
        raise typer.Exit(1)


@probe_app.command("time")
def time_(
    models: Annotated[
        list[str], typer.Argument(help="Bundle folders or Hub ids to compare; 'tiny' and 'smol' ship with the package.")
    ],
    out: Out = None,
    pairs: Annotated[
        int, typer.Option(min=2, help="Number of pairs of sounds; each pair is used at every point of a sweep.")
    ] = 20,
    wordings: Annotated[int, typer.Option(min=1, help="Number of paraphrases of each question.")] = 1,
    seed: Seed = None,
    batch: Batch = 64,
    as_json: AsJson = False,
) -> None:
    """Test perception of order and time: accuracy against gap, length, and distance to a boundary.

    A model that ignores time scores exactly one half.
    """
    import pal
    from pal.errors import ConfigError
    from pal.lab.names import distinct_names
    from pal.probe.time import probe_time

    if len(set(models)) < len(models):
        raise ConfigError("a model is given twice; give each model once")
    names = distinct_names([Path(model) for model in models])
    # load all models before clips are rendered, so that a wrong name fails at once
    loaded = [(name, pal.load(model)) for name, model in zip(names, models, strict=True)]
    result = probe_time(loaded, pairs, wordings, _seed(seed), batch, shows_progress())
    finish(result, models[0] if len(models) == 1 else "+".join(names).replace("/", "-"), out, as_json)


@probe_app.command("layers")
def layers_(
    model: Model,
    manifests: Manifests = None,
    out: Out = None,
    clips: Annotated[
        int, typer.Option(min=1, help="Maximum number of clips of a data set, spread evenly over it.")
    ] = 200,
    question: Annotated[str | None, typer.Option(help="Question asked about every clip.", show_default=False)] = None,
    seed: Seed = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size: clips of a forward pass.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Train linear probes for sound labels on the hidden states of text rows, after each layer."""
    import pal
    from pal.probe.layers import QUESTION, probe_layers

    asked = QUESTION if question is None else question
    result = probe_layers(pal.load(model), manifests or [], clips, _seed(seed), asked, batch, shows_progress())
    finish(result, model, out, as_json)


@probe_app.command("mask")
def mask(
    model: Model,
    manifests: Manifests = None,
    pathway: Annotated[
        list[str] | None, typer.Option(help="Mask this pathway: keys (LAL) or rows (PLITS, summary tokens).")
    ] = None,
    encoder: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Mask the audio of one encoder (or of one fused group), counted from 0."),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="FROM-TO", help="Mask audio in these layers, both included.")
    ] = None,
    seconds: Annotated[
        list[str] | None, typer.Option(metavar="FROM-TO", help="Mask this span of the clip, in seconds.")
    ] = None,
    limit: Limit = 120,
    batch: Batch = 32,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy lost when a part of the audio is masked, by domain and by task.

    Different options mask their intersection; a repeated option masks the union of its values. Without options: each
    pathway, encoder, layer (or quarter of the layers), quarter of the time, and all audio, one after the other.
    """
    from pal.probe.mask import chosen_condition, probe_mask

    chosen = chosen_condition(pathway or (), encoder or (), layers or (), seconds or ())
    with _opened(model, manifests, limit, seed) as (loaded, records, settings):
        options: Any = {"batch": batch, "progress": shows_progress(), "settings": settings}
        result = probe_mask(loaded, records, chosen, seed=settings["seed"], **options)
    finish(result, model, out, as_json)


@probe_app.command("depth")
def depth(
    model: Model,
    manifests: Manifests = None,
    alone: Annotated[bool, typer.Option("--alone", help="Also restrict each pathway alone, if there are two.")] = False,
    limit: Limit = 120,
    batch: Batch = 32,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Restrict audio to the first 1/4, 1/3 or 1/2 of the layers, or a window of layers: accuracy and cost."""
    from pal.probe.depth import probe_depth

    with _opened(model, manifests, limit, seed) as (loaded, records, settings):
        options: Any = {"batch": batch, "progress": shows_progress(), "settings": settings}
        result = probe_depth(loaded, records, alone, seed=settings["seed"], **options)
    finish(result, model, out, as_json)


@contextmanager
def _opened(
    model: str, manifests: list[Path] | None, limit: int, seed: int | None
) -> Iterator[tuple[PalModel, list[Record], dict[str, Any]]]:
    """The model, its questions, and their settings; synthetic scenes exist as long as the block lasts."""
    import pal
    from pal.lab.records import records_to_ask

    settings = {"manifests": [str(path) for path in manifests or []], "limit": limit, "seed": _seed(seed)}
    with records_to_ask(manifests or [], limit, _seed(seed)) as records:
        yield pal.load(model), records, settings


def _seed(given: int | None) -> int:
    from pal.lab.records import SCENES_SEED

    return SCENES_SEED if given is None else given


def finish(result: ProbeResult, model: str, out: Path | None, as_json: bool) -> None:
    """Save a result as a folder, and print it."""
    # the whole path, since runs of several recipes end in the same name, such as "seed-1" or "model"
    name = "-".join(part for part in Path(model).parts if part not in ("/", ".", ".."))
    folder = out or Path("runs/probe") / f"{result.probe}-{name}"
    result.save(folder)
    if as_json:
        print_json(result.to_dict())
        return
    _print_tables(result)
    for sentence in result.reading:
        typer.echo(f"- {sentence}")
    typer.echo(f"{folder}: probe.json, {len(result.pictures)} pictures, {result.seconds:.0f} s")


def _print_tables(result: ProbeResult) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, rows in result.tables.items():
        if not rows:
            continue
        table = Table(title=title)
        shown = [heading for heading in rows[0] if not heading.endswith("ci95")]
        for place, heading in enumerate(shown):
            table.add_column(heading.replace("_", " "), justify="right" if place else "left")
        for row in rows:
            table.add_row(*(_cell(row, heading) for heading in shown))
        Console().print(table)


def _cell(row: Mapping[str, Any], heading: str) -> str:
    """Text of a value, with its interval if the row has one: at the key "X ci95", or "ci95" right after X."""
    from pal.lab.numbers import format_value

    headings = list(row)
    after = headings[headings.index(heading) + 1 : headings.index(heading) + 2]
    ends = row.get(f"{heading} ci95", row["ci95"] if after == ["ci95"] else None)
    return format_value(row[heading]) if ends is None else f"{format_value(row[heading])} ({format_value(ends)})"
