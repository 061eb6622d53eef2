"""The commands `pal probe ...`: each takes a model, writes a folder of JSON and pictures, and says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pal.app.options import AsJson
from pal.app.output import print_json, shows_progress

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
    from pal.probe.material import SCENES_SEED, material

    if (audio is None) != (question is None):
        raise typer.BadParameter("give both, or none", param_hint="--audio --ask")
    if audio is not None and manifests:
        raise typer.BadParameter("takes no manifest", param_hint="--audio")
    loaded = pal.load(model)
    if audio is not None and question is not None:
        one = Record("audio", (str(audio),), (Turn(question, ""),), task="", dataset="")
        finding = probe_attention(
            loaded, [one], examples, batch, progress=shows_progress(), settings={"audio": str(audio)}
        )
    else:
        drawn = SCENES_SEED if seed is None else seed
        facts = {"manifests": [str(path) for path in manifests or []], "limit": limit, "seed": drawn}
        with material(manifests or [], limit, drawn) as records:
            finding = probe_attention(loaded, records, examples, batch, progress=shows_progress(), settings=facts)
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
    import pal
    from pal.probe.health import probe_health
    from pal.probe.material import SCENES_SEED, material

    with material(manifests or [], limit, SCENES_SEED if seed is None else seed) as records:
        finding = probe_health(pal.load(model), records, batch, progress=shows_progress())
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
    from pal.probe import time
    from pal.probe.material import SCENES_SEED

    names = labels(models)
    # all before the first clip is made: a name that is wrong is said at once
    loaded = [(name, pal.load(model)) for name, model in zip(names, models, strict=True)]
    chosen = SCENES_SEED if seed is None else seed
    finding = time.probe(loaded, pairs, wordings, chosen, batch, shows_progress())
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
    from pal.probe import layers
    from pal.probe.material import SCENES_SEED

    chosen = SCENES_SEED if seed is None else seed
    asked = layers.QUESTION if question is None else question
    finding = layers.probe(pal.load(model), manifests or [], clips, chosen, asked, batch, shows_progress())
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
    import pal
    from pal.probe.material import SCENES_SEED, material

    drawn = SCENES_SEED if seed is None else seed
    facts = {"manifests": [str(path) for path in manifests or []], "limit": limit}
    with material(manifests or [], limit, drawn) as records:
        finding = probe_mask(
            pal.load(model), records, chosen, seed=drawn, batch=batch, progress=shows_progress(), settings=facts
        )
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
    import pal
    from pal.probe.depth import probe_depth
    from pal.probe.material import SCENES_SEED, material

    drawn = SCENES_SEED if seed is None else seed
    facts = {"manifests": [str(path) for path in manifests or []], "limit": limit}
    with material(manifests or [], limit, drawn) as records:
        finding = probe_depth(
            pal.load(model), records, alone, seed=drawn, batch=batch, progress=shows_progress(), settings=facts
        )
    finish(finding, model, out, as_json)


def finish(finding: Finding, model: str, out: Path | None, as_json: bool) -> None:
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


def _print_tables(finding: Finding) -> None:
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
    headings = list(row)
    after = headings[headings.index(heading) + 1 : headings.index(heading) + 2]
    ends = row.get(f"{heading} ci95", row["ci95"] if after == ["ci95"] else None)
    return _shown(row[heading]) if ends is None else f"{_shown(row[heading])} ({' to '.join(map(_shown, ends))})"


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def labels(models: list[str]) -> list[str]:
    """What tells the models apart: their paths without what all begin and end with.

    Raises:
        ConfigError: a model is given twice.
    """
    from pal.errors import ConfigError

    if len(set(models)) < len(models):
        raise ConfigError("a model is given twice; give each once")
    if len(models) == 1:
        return [Path(models[0]).name]
    paths = [list(Path(model).parts) for model in models]
    while all(len(path) > 1 for path in paths) and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return ["/".join(path) for path in paths]
