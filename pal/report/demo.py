"""Results of `pal demo`: a table for the terminal, a page of their own, and sections of a joint report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal import shipped
from pal.audio import load
from pal.errors import BundleError
from pal.files import write_text
from pal.lab.numbers import format_bytes, format_milliseconds, format_ratio
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
DESCRIPTION = "demos (results.json)"

_NOTES = (
    "LAL's audio makes no queries and skips the feed-forward network. So a training step computes less and saves "
    "fewer activations; the longer the audio and the larger the language model, the larger the difference.",
    "LAL does not shrink the KV cache: with LAL in every layer, a clip has about as many audio keys and values as with "
    "PLITS. LAL in the first third of the layers keeps a third of them, PAL about two thirds.",
    "Encoder and connector are the same in all three. At this size, they and the fixed cost of each operation are a "
    "large part of a step. So the factors here hold for a toy on this machine, not for a model with a billion "
    "parameters.",
    "There is one seed and one data set of synthetic sounds. If two intervals overlap, or the interval of a difference "
    "contains 0, this run does not show which integration is better.",
)
"""Limits of the demo's numbers, for readers who quote them."""

Row = tuple[str, list[str]]
"""Label of a row, and its cell for each integration."""


def rows(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """The comparison as text: (title, rows) of each group, with a cell for each integration."""
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

    def cost(label: str, key: str, text: Callable[[float], str]) -> Row:
        return row(label, lambda one: f"{text(one['cost'][key])} {format_ratio(one['cost'][key], reference[key])}")

    costs = [
        cost("training step", "step_seconds", format_milliseconds),
        cost("peak memory", "peak_bytes", format_bytes),
        cost("saved activations", "saved_bytes", format_bytes),
        cost("K/V of one clip", "audio_kv_bytes", format_bytes),
    ]
    training = [
        row("median step", lambda one: format_milliseconds(one["training"]["step_seconds"])),
        row("training in all", lambda one: f"{one['training']['seconds']:.0f} s"),
        row("steps", lambda one: f"{one['training']['steps']:,}"),
        row("parameters", lambda one: f"{one['cost']['parameters']:,}"),
        row("of them trained", lambda one: f"{one['cost']['trained_parameters']:,}"),
    ]
    return [("accuracy in %", accuracy), ("cost of one batch", costs), ("training", training)]


def table(results: Mapping[str, Any]) -> TerminalTable:
    """Table of the comparison, for the terminal."""
    from rich import box
    from rich.table import Table as TerminalTable

    data = results["data"]
    title = f"{data['held_out_questions']:,} questions on {data['held_out_scenes']:,} held-out scenes"
    out = TerminalTable(
        title=title + (" (quick run: scores mean nothing)" if results["quick"] else ""), box=box.SIMPLE, pad_edge=False
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
        path: file to write.
        results: content of `results.json`.
        clip: audio file of the fresh scene.
    """
    lead: list[Part] = [
        Prose(
            "PLITS puts audio tokens into the text. With LAL, text only attends to audio. PAL does both, with fewer "
            "audio tokens in the text. Encoder, language model, data and order of training steps are the same: only "
            "the integration differs.",
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
        *_recording(results, embed),
        Section("What LAL saves and what it does not save", [Points(_NOTES)]),
    ]
    page = HtmlPage(
        title="PLITS, LAL and PAL compared",
        heading="Three ways to attach audio to a language model",
        lead=[*lead, Cards(cards)],
        chapters=[Chapter("", sections)],
        footer=_footer(results),
    )
    write_text(path, render(page))


# Sections of a joint report


@dataclass(frozen=True)
class DemoPart:
    """Results of a finished demo."""

    results: Mapping[str, Any]
    clip: Path
    comparison: Section
    footer: str


def find(path: Path) -> list[Path]:
    """The folder, if it holds results of a demo."""
    return [path] if (path / "results.json").is_file() else []


def read(path: Path) -> DemoPart:
    """Read the results of a demo. Raises BundleError if they are damaged."""
    file = path / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{file}: damaged; run the demo again") from None
    clip = path / "fresh" / "audio" / Path(results["fresh_scene"]["file"]).name
    return DemoPart(results, clip, _comparison(results), _footer(results))


def chapter(found: Sequence[tuple[str, DemoPart]], embed: MediaEmbedder) -> tuple[list[Section], list[dict[str, Any]]]:
    """Comparison and fresh scene of each demo; the runs in its folder have chapters of their own."""
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
    text = (
        "This was a quick run, to check that everything works. The models are hardly trained, so scores mean nothing."
    )
    return Prose(text, "warning")


def _comparison(results: Mapping[str, Any]) -> Section:
    data = results["data"]
    caption = (
        f"{data['held_out_questions']:,} questions on {data['held_out_scenes']:,} held-out scenes, scored by exact "
        "match. In brackets: 95\u202f% intervals over scenes. “Without audio” is the same model asked the same "
        "questions without audio, so compare the gain over it. "
        f"Costs are those of one training step on the same {data['measured_batch']['clips']} clips with "
        f"{data['measured_batch']['questions']} questions, measured alternately; × is relative to PLITS."
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
        "Only rows in which bars do not overlap show a difference. The distance between a mark and its vertical tick "
        "is the gain from audio."
    )
    picture = embed.plot(alt, partial(draw_scores, scores=scores), score_size(scores))
    return Section("Accuracy, task by task", [Prose(caption), picture])


def _learning(results: Mapping[str, Any], embed: MediaEmbedder) -> Section:
    curves = {
        name.upper(): [(step, loss) for step, loss in one["training"]["loss_curve"]]
        for name, one in results["integrations"].items()
    }
    caption = (
        "Loss on the answers during training: logged values (pale) and their running mean (bold). A curve that falls "
        "earlier learned earlier to use the audio."
    )
    draw = partial(draw_losses, curves=curves, borders={})
    picture = embed.plot("Training loss of each integration", draw, loss_size(len(curves)))
    return Section("Learning", [Prose(caption), picture])


def _fresh_scene(results: Mapping[str, Any], clip: Path, embed: MediaEmbedder) -> Section:
    fresh = results["fresh_scene"]
    caption = (
        "Generated after training from another seed. Listen, and compare the answers with the truth. Sustained notes "
        "are horizontal stripes, noise is a cloud, knocks are vertical lines."
    )
    sound = embed.sound(clip)
    alt = "Spectrogram of the fresh scene, with its events underneath"
    picture = PagePicture(alt, missing="no picture, since the sound is missing", sound=sound)
    if clip.is_file():
        samples_N = load(clip, RATE).samples_N.numpy()
        events = [(event["label"], event["start"], event["end"]) for event in fresh["events"]]
        draw = partial(draw_spectrogram, samples_N=samples_N, rate=RATE, events=events)
        picture = replace(embed.plot(alt, draw, (8.0, 4.2)), sound=sound)
    return Section("A fresh scene", [Prose(caption), picture, _answers(fresh, list(results["integrations"]))])


def _recording(results: Mapping[str, Any], embed: MediaEmbedder) -> list[Section]:
    """Answers of the larger shipped model about a real recording; none in results without them."""
    recording = results.get("recording")
    if recording is None:
        return []
    caption = (
        "The models above are toys. The same method gives a language model of 135 million parameters the ears of "
        f"Whisper tiny.en: the model {recording['model']}, which ships with the package and was not trained on this "
        "recording."
    )
    clip = shipped.RECORDING
    samples_N = load(clip, RATE).samples_N.numpy()
    draw = partial(draw_spectrogram, samples_N=samples_N, rate=RATE, events=[("a dog", 0.0, len(samples_N) / RATE)])
    picture = replace(embed.plot("Spectrogram of the recording", draw, (8.0, 4.2)), sound=embed.sound(clip))
    lines: list[list[str | TableCell]] = [[one["question"], one["answer"]] for one in recording["questions"]]
    answers = Table("Answers about the recording", ["question", recording["model"]], [("", lines)], words=True)
    return [Section("A real recording", [Prose(caption), picture, answers])]


def _answers(fresh: Mapping[str, Any], names: Sequence[str]) -> Table:
    lines: list[list[str | TableCell]] = []
    for question in fresh["questions"]:
        answers = (
            TableCell(question["answers"][name], "right" if question["correct"][name] else "wrong") for name in names
        )
        lines.append([question["question"], question["truth"], *answers])
    headings = ["question", "truth", *(name.upper() for name in names)]
    return Table("Answers of each integration", headings, [("", lines)], words=True)


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
        facts=[(label, format_ratio(one["cost"][key], plits["cost"][key])) for key, label in labels.items()],
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
