"""What the demo shows: one table for the terminal, one page, and its part of a page that joins runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.audio import load
from pal.errors import BundleError
from pal.files import write_text
from pal.lab.numbers import milliseconds, size, times
from pal.plots import colour_of
from pal.report.embed import RATE, MediaEmbedder
from pal.report.page import (
    Cards,
    Chapter,
    HtmlPage,
    PagePicture,
    Part,
    Points,
    Prose,
    ResultCard,
    Section,
    Table,
    TableCell,
    render,
)
from pal.report.plots import draw_scores, draw_spectrogram, score_size
from pal.train.curves import draw_losses, loss_size

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

TITLE = "The demo"
UNDERSTANDS = "demos (results.json)"

_NOTES = (
    "LAL's audio makes no queries and never enters the feed-forward network. So a training step computes less and "
    "remembers fewer activations; the longer the audio and the larger the language model, the more this shows.",
    "It does not shrink what decoding keeps: with LAL in every layer, the audio keys and values of a clip are about as "
    "many as those that PLITS leaves in the cache. LAL in the first third of the layers keeps a third of them, PAL "
    "about two thirds. The saving in training is not a saving in cache.",
    "The encoder and connector run the same way in all three, and at this size they and the fixed cost of each "
    "operation are a large part of a step. The factors here are those of a toy on this machine, not those of a "
    "model with a billion parameters.",
    "One seed and one data set of made-up sounds. Where two intervals overlap, or that of the difference holds 0, this "
    "run does not say which integration is better.",
)
"""What a reader must know before quoting a number from the page."""

Row = tuple[str, list[str]]
"""What a row says, and its cell for each integration."""


def rows(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """The comparison as text: (section, rows), a cell for each integration in order."""
    each = list(results["integrations"].values())

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> Row:
        return label, [cell(one) for one in each]

    tasks = list(each[0]["per_task"])
    accuracy = [row("all tasks", lambda one: _interval(one["accuracy"]))]
    accuracy += [(task, [_interval(one["per_task"][task]) for one in each]) for task in tasks]
    accuracy += [
        row("without audio", lambda one: _percent(one["accuracy"]["no_audio_score"])),
        row("gain from audio", lambda one: _difference(one["accuracy"]["gain"], one["accuracy"]["gain_ci95"])),
        row("minus PLITS", lambda one: _difference(one["minus_plits"]["difference"], one["minus_plits"]["ci95"])),
    ]
    reference = each[0]["cost"]

    def cost(label: str, key: str, shown: Callable[[float], str]) -> Row:
        return row(label, lambda one: f"{shown(one['cost'][key])} {times(one['cost'][key], reference[key])}")

    costs = [
        cost("training step", "step_seconds", milliseconds),
        cost("peak memory", "peak_bytes", size),
        cost("saved activations", "saved_bytes", size),
        cost("K/V of one clip", "audio_kv_bytes", size),
    ]
    training = [
        row("median step", lambda one: milliseconds(one["training"]["step_seconds"])),
        row("training in all", lambda one: f"{one['training']['seconds']:.0f} s"),
        row("steps", lambda one: f"{one['training']['steps']:,}"),
        row("parameters", lambda one: f"{one['cost']['parameters']:,}"),
        row("of them trained", lambda one: f"{one['cost']['trained_parameters']:,}"),
    ]
    return [("accuracy in %", accuracy), ("cost of one batch", costs), ("training", training)]


def table(results: Mapping[str, Any]) -> TerminalTable:
    """The comparison for the terminal."""
    from rich import box
    from rich.table import Table as TerminalTable

    data = results["data"]
    title = f"{data['held_out_questions']:,} questions on {data['held_out_scenes']:,} held-out scenes"
    out = TerminalTable(
        title=title + (" (quick: not to be trusted)" if results["quick"] else ""), box=box.SIMPLE, pad_edge=False
    )
    out.add_column("", no_wrap=True)
    for name in results["integrations"]:
        out.add_column(name.upper(), justify="right", no_wrap=True)
    for section, lines in rows(results):
        out.add_section()
        for number, (label, cells) in enumerate(lines):
            if number == 0:
                out.add_row(f"[bold]{section}[/bold]")
            out.add_row(label, *(cell.replace("[", r"\[") for cell in cells))
    return out


def write_page(path: Path, results: Mapping[str, Any], clip: Path) -> None:
    """Write `report.html`.

    Args:
        path: of the page.
        results: as in `results.json`.
        clip: audio file of the fresh scene.
    """
    lead: list[Part] = [
        Prose(
            "PLITS puts audio tokens into the text. LAL lets the text look at the audio and nothing more. PAL does "
            "both, on a diet. Same encoder, same language model, same data, same order of training steps: only the "
            "integration differs.",
            "lead",
        )
    ]
    if results["quick"]:
        lead.append(_quick())
    names = list(results["integrations"])
    cards = [_card(number, name, results["integrations"]) for number, name in enumerate(names)]
    embed = MediaEmbedder()
    sections = [
        _comparison(results),
        _accuracy(results, embed),
        _learning(results, embed),
        _fresh_scene(results, clip, embed),
        Section("What LAL saves, and what it does not", [Points(_NOTES)]),
    ]
    page = HtmlPage(
        title="PLITS, LAL and PAL compared",
        heading="Three ways to give a language model ears",
        lead=[*lead, Cards(cards)],
        chapters=[Chapter("", sections)],
        footer=_footer(results),
    )
    write_text(path, render(page))


# Its part of a joined page


@dataclass(frozen=True)
class DemoPart:
    """A finished demo."""

    results: Mapping[str, Any]
    clip: Path
    comparison: Section
    footer: str


def find(path: Path) -> list[Path]:
    """The folder, if a demo left its results there."""
    return [path] if (path / "results.json").is_file() else []


def read(path: Path) -> DemoPart:
    """What `pal demo` wrote. Raises BundleError where it is damaged."""
    file = path / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{file}: damaged; run the demo again") from None
    clip = path / "fresh" / "audio" / Path(results["fresh_scene"]["file"]).name
    return DemoPart(results, clip, _comparison(results), _footer(results))


def chapter(found: Sequence[tuple[str, DemoPart]], embed: MediaEmbedder) -> tuple[list[Section], list[dict[str, Any]]]:
    """The comparison and the fresh scene. Curves and accuracies are those of the runs that lie in the demo's folder."""
    sections, facts = [], []
    for name, demo in found:
        first = [_quick()] if demo.results["quick"] else []
        sections.append(Section(f"{name}: the comparison", [*first, *demo.comparison.parts, Prose(demo.footer)]))
        scene = _fresh_scene(demo.results, demo.clip, embed)
        sections.append(Section(f"{name}: a fresh scene", scene.parts))
        accuracies = {one: its["accuracy"]["score"] for one, its in demo.results["integrations"].items()}
        facts.append({"accuracy": accuracies, "quick": demo.results["quick"]})
    return sections, facts


def _quick() -> Prose:
    text = "A quick run: it shows that everything works. The models are hardly trained, so the scores mean nothing."
    return Prose(text, "warning")


def _comparison(results: Mapping[str, Any]) -> Section:
    data = results["data"]
    caption = (
        f"{data['held_out_questions']:,} questions on {data['held_out_scenes']:,} scenes that no model has met; an "
        "answer counts if it is the right one word for word. In brackets: 95\u202f% intervals over scenes. “Without "
        "audio” is the same model asked the same questions with nothing to hear, so what matters is the gain over it. "
        f"Costs are of one training step on the same {data['measured_batch']['clips']} clips with "
        f"{data['measured_batch']['questions']} questions, measured in turns; × is relative to PLITS."
    )
    headings = ["", *(name.upper() for name in results["integrations"])]
    groups = [(title, [[label, *cells] for label, cells in lines]) for title, lines in rows(results)]
    return Section("The comparison", [Prose(caption), Table("The integrations, side by side", headings, groups)])


def _accuracy(results: Mapping[str, Any], embed: MediaEmbedder) -> Section:
    each = results["integrations"]
    tasks = list(next(iter(each.values()))["per_task"])
    scores = {task: {name.upper(): one["per_task"][task] for name, one in each.items()} for task in tasks}
    scores["all"] = {name.upper(): one["accuracy"] for name, one in each.items()}
    alt = "Accuracy of each integration on each task, with 95 % intervals"
    caption = (
        "Look for marks of one row whose bars do not overlap: only there do the integrations really differ. The "
        "distance between a mark and its upright tick is what the model owes to its ears."
    )
    picture = embed.plot(alt, partial(draw_scores, scores=scores), score_size(scores))
    return Section("Accuracy, task by task", [Prose(caption), picture])


def _learning(results: Mapping[str, Any], embed: MediaEmbedder) -> Section:
    curves = {
        name.upper(): [(step, loss) for step, loss in one["training"]["loss_curve"]]
        for name, one in results["integrations"].items()
    }
    caption = (
        "Loss on the answers while training; pale is every logged value, bold the running mean. A curve that bends "
        "down earlier learned to listen earlier."
    )
    draw = partial(draw_losses, curves=curves, borders={})
    picture = embed.plot("Training loss of each integration", draw, loss_size(len(curves)))
    return Section("Learning", [Prose(caption), picture])


def _fresh_scene(results: Mapping[str, Any], clip: Path, embed: MediaEmbedder) -> Section:
    fresh = results["fresh_scene"]
    caption = (
        "Made after training from another seed. Listen, look, and compare the answers with the truth. Sustained notes "
        "show as level stripes, noise as clouds, knocks as upright lines."
    )
    sound = embed.sound(clip)
    alt = "Spectrogram of the fresh scene, with its events underneath"
    picture = PagePicture(alt, missing="no picture without its sound", sound=sound)
    if clip.is_file():
        samples_N = load(clip, RATE).samples_N.numpy()
        events = [(event["label"], event["start"], event["end"]) for event in fresh["events"]]
        draw = partial(draw_spectrogram, samples_N=samples_N, rate=RATE, events=events)
        picture = replace(embed.plot(alt, draw, (8.0, 4.2)), sound=sound)
    return Section("A fresh scene", [Prose(caption), picture, _answers(fresh, list(results["integrations"]))])


def _answers(fresh: Mapping[str, Any], names: Sequence[str]) -> Table:
    lines: list[list[str | TableCell]] = []
    for question in fresh["questions"]:
        answers = (
            TableCell(question["answers"][name], "right" if question["correct"][name] else "wrong") for name in names
        )
        lines.append([question["question"], question["truth"], *answers])
    headings = ["question", "truth", *(name.upper() for name in names)]
    return Table("What each of them answered", headings, [("", lines)], words=True)


def _card(number: int, name: str, integrations: Mapping[str, Any]) -> ResultCard:
    one, plits = integrations[name], integrations["plits"]
    low, high = one["accuracy"]["ci95"]
    labels = {
        "step_seconds": "time of a training step",
        "saved_bytes": "saved activations",
        "audio_kv_bytes": "audio keys and values",
    }
    return ResultCard(
        title=name.upper(),
        colour=colour_of(number),
        value=_share(one["accuracy"]["score"]),
        note=f"accuracy, 95\u202f% interval {_share(low)} to {_share(high)}",
        facts=[(label, times(one["cost"][key], plits["cost"][key])) for key, label in labels.items()],
    )


def _footer(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"pal {results['pal_version']}, torch {machine['torch']}, {machine['system']}, "
        f"{machine['gpu'] or str(machine['cpu_cores']) + ' CPU cores'}; seed {results['seed']}; "
        f"{results['seconds'] / 60:.1f} minutes"
    )


def _interval(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["ci95"]
    return f"{accuracy['score'] * 100:.1f} [{low * 100:.1f}, {high * 100:.1f}]"


def _difference(value: float | None, ci95: tuple[float, float] | None) -> str:
    if value is None or ci95 is None:
        return "–"
    return f"{value * 100:+.1f} [{ci95[0] * 100:.1f}, {ci95[1] * 100:.1f}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
