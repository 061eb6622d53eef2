"""The commands `pal probe ...`: each takes a model, writes a folder of JSON and pictures, and says what it found."""

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
Batch = Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of what is made up or drawn.", show_default=False)]


@probe_app.command("attention")
def attention(
    model: Model,
    manifests: Manifests = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", help="Ask about this file instead.", show_default=False)
    ] = None,
    question: Annotated[
        str | None, typer.Option("--ask", help="The question about --audio.", show_default=False)
    ] = None,
    limit: Limit = 128,
    examples: Annotated[int, typer.Option(min=0, help="Clips with heat-maps.")] = 3,
    batch: Batch = 16,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """How much attention goes to audio, by layer, head, pathway, word and second."""
    import pal
    from pal.data.manifest import Record, Turn
    from pal.probe.attention_mass import probe_attention

    if (audio is None) != (question is None):
        raise typer.BadParameter("give both, or none", param_hint="--audio --ask")
    if audio is not None and manifests:
        raise typer.BadParameter("takes no manifest", param_hint="--audio")
    options: Any = {"examples": examples, "batch": batch, "progress": shows_progress()}
    if audio is not None and question is not None:
        one = Record("audio", (str(audio),), (Turn(question, ""),), task="", dataset="")
        finding = probe_attention(pal.load(model), [one], settings={"audio": str(audio)}, **options)
    else:
        with _opened(model, manifests, limit, seed) as (loaded, records, settings):
            finding = probe_attention(loaded, records, settings=settings, **options)
    finish(finding, model, out, as_json)


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
    """Look for the faults that an audio LLM can have and still answer; status 1 where there is one."""
    from pal.probe.health import probe_health

    with _opened(model, manifests, limit, seed) as (loaded, records, _):
        finding = probe_health(loaded, records, batch, progress=shows_progress())
    finish(finding, model, out, as_json)
    if any(row["status"] == "fault" for row in finding.tables["checks"]):
        raise typer.Exit(1)


@probe_app.command("time")
def time_(
    models: Annotated[
        list[str], typer.Argument(help="Bundle folders or Hub ids, to be compared; 'tiny' ships with the package.")
    ],
    out: Out = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of sounds; each is in every clip of a sweep once.")] = 20,
    wordings: Annotated[int, typer.Option(min=1, help="Ways of asking each question.")] = 1,
    seed: Seed = None,
    batch: Batch = 64,
    as_json: AsJson = False,
) -> None:
    """Are order and time kept? Accuracy against the gap between two sounds, their length, and the distance to a border.

    What ignores time scores exactly one half. One line a model.
    """
    import pal
    from pal.errors import ConfigError
    from pal.lab.names import distinct_names
    from pal.probe.time import probe_time

    if len(set(models)) < len(models):
        raise ConfigError("a model is given twice; give each once")
    names = distinct_names([Path(model) for model in models])
    # all before the first clip is made: a name that is wrong is said at once
    loaded = [(name, pal.load(model)) for name, model in zip(names, models, strict=True)]
    finding = probe_time(loaded, pairs, wordings, _seed(seed), batch, shows_progress())
    finish(finding, models[0] if len(models) == 1 else "+".join(names).replace("/", "-"), out, as_json)


@probe_app.command("layers")
def layers_(
    model: Model,
    manifests: Manifests = None,
    out: Out = None,
    clips: Annotated[int, typer.Option(min=1, help="Most clips of a data set, taken evenly from all of it.")] = 200,
    question: Annotated[str | None, typer.Option(help="Asked about every clip.", show_default=False)] = None,
    seed: Seed = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips in a forward pass.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Where does audio enter the LLM's own rows? Linear probes for what sounds, on text rows after each layer."""
    import pal
    from pal.probe.layers import QUESTION, probe_layers

    asked = QUESTION if question is None else question
    finding = probe_layers(pal.load(model), manifests or [], clips, _seed(seed), asked, batch, shows_progress())
    finish(finding, model, out, as_json)


@probe_app.command("mask")
def mask(
    model: Model,
    manifests: Manifests = None,
    pathway: Annotated[
        list[str] | None, typer.Option(help="Hide this way in: keys (LAL) or rows (PLITS, summaries).")
    ] = None,
    encoder: Annotated[
        list[int] | None, typer.Option(min=0, help="Hide what one encoder heard (or several that are fused), from 0.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="FROM-TO", help="Hide it in these layers, both included.")
    ] = None,
    seconds: Annotated[
        list[str] | None, typer.Option(metavar="FROM-TO", help="Hide what sounds then, from the start of the clip.")
    ] = None,
    limit: Limit = 120,
    batch: Batch = 32,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What is lost when a part of the audio is hidden, by domain and by task.

    Options of different names narrow it down together, the same option again widens it. Without any: each way in, each
    encoder, each layer (or quarter of many), each quarter of the time, and everything, one after the other.
    """
    from pal.probe.mask import chosen_condition, probe_mask

    chosen = chosen_condition(pathway or (), encoder or (), layers or (), seconds or ())
    with _opened(model, manifests, limit, seed) as (loaded, records, settings):
        options: Any = {"batch": batch, "progress": shows_progress(), "settings": settings}
        finding = probe_mask(loaded, records, chosen, seed=settings["seed"], **options)
    finish(finding, model, out, as_json)


@probe_app.command("depth")
def depth(
    model: Model,
    manifests: Manifests = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also restrict each way in by itself, where there are several.")
    ] = False,
    limit: Limit = 120,
    batch: Batch = 32,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The same weights with audio in the first 1/4, 1/3, 1/2 or all of the layers, or a window: accuracy and cost."""
    from pal.probe.depth import probe_depth

    with _opened(model, manifests, limit, seed) as (loaded, records, settings):
        options: Any = {"batch": batch, "progress": shows_progress(), "settings": settings}
        finding = probe_depth(loaded, records, alone, seed=settings["seed"], **options)
    finish(finding, model, out, as_json)


@contextmanager
def _opened(
    model: str, manifests: list[Path] | None, limit: int, seed: int | None
) -> Iterator[tuple[PalModel, list[Record], dict[str, Any]]]:
    """The model, the records to ask it, and where those came from; made-up scenes last as long as the block."""
    import pal
    from pal.lab.records import records_to_ask

    settings = {"manifests": [str(path) for path in manifests or []], "limit": limit, "seed": _seed(seed)}
    with records_to_ask(manifests or [], limit, _seed(seed)) as records:
        yield pal.load(model), records, settings


def _seed(given: int | None) -> int:
    from pal.lab.records import SCENES_SEED

    return SCENES_SEED if given is None else given


def finish(finding: ProbeResult, model: str, out: Path | None, as_json: bool) -> None:
    """Write the finding's folder and show it."""
    # the whole path: runs of several recipes end alike, in "seed-1" or "model"
    name = "-".join(part for part in Path(model).parts if part not in ("/", ".", ".."))
    folder = out or Path("runs/probe") / f"{finding.probe}-{name}"
    finding.save(folder)
    if as_json:
        print_json(finding.to_dict())
        return
    _print_tables(finding)
    for sentence in finding.reading:
        typer.echo(f"- {sentence}")
    typer.echo(f"{folder}: probe.json, {len(finding.pictures)} pictures, {finding.seconds:.0f} s")


def _print_tables(finding: ProbeResult) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, rows in finding.tables.items():
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
    """A value, with its interval where the row has one: under "X ci95", or "ci95" right after X."""
    from pal.lab.numbers import shown

    headings = list(row)
    after = headings[headings.index(heading) + 1 : headings.index(heading) + 2]
    ends = row.get(f"{heading} ci95", row["ci95"] if after == ["ci95"] else None)
    return shown(row[heading]) if ends is None else f"{shown(row[heading])} ({shown(ends)})"
