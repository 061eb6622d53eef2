"""Scores of trained runs on the curriculum's held-out questions, and what training did to answers without audio.

How they learned, DIR/curves.png, has each run's training loss over steps and over minutes.

    python recipes/real/held_out.py runs/real/plits runs/real/lal runs/real/pal --out runs/real/held-out

For each run DIR/NAME.json, and a Markdown table of all runs whose scores are in DIR. A run whose scores are there is
not measured again. A step of the last stage is measured for all runs in turns, on the same batch, since training shares
its machine with other work; DIR/steps.json has it, and the minutes of the curves come from it.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pal
from pal.backbone import adapters
from pal.bench.measure import training_costs
from pal.data.collate import WaveformCache
from pal.data.manifest import Manifest, Record, Turn
from pal.data.prompts import conversation_of, encode
from pal.evaluate import evaluate, from_records
from pal.features import FeatureCache
from pal.files import write_bytes, write_json
from pal.memory import keep_freed_memory
from pal.model import PalModel
from pal.plots import escape_label, render, style_of
from pal.train.curves import read_log, smooth
from pal.train.objectives import AnswerLoss
from pal.train.recipe import load_recipe
from pal.train.sources import StageData, open_sources
from pal.types import Batch

PROMPTS = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
"""Questions without audio."""
SETS = {
    "ESC-10, fold 4": "esc10-fold4",
    "spoken digits, theo": "fsdd-theo",
    "transcription, word error rate": "speech-transcribe",
    "is a word spoken": "speech-word-present",
    "instrument": "instruments",
    "instrument family": "families",
    "strings of digits": "digit-strings",
    "mixtures of sounds": "scene-pairs",
    "other questions on speech": "speech-other",
    "other questions on music": "music-other",
}
"""Name -> held-out manifest of the curriculum."""


def scores(
    model: PalModel, curriculum: Path, cache: FeatureCache | None = None, only: list[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Each set's score with its interval, and that of the same model without audio.

    Args:
        model: a trained model.
        curriculum: folder that `pal data curriculum` wrote.
        cache: features of the model's encoders; None encodes the clips.
        only: some of `SETS`.
    """
    found = {}
    for name in only or SETS:
        path = curriculum / "held_out" / f"{SETS[name]}.jsonl"
        rule = "word_errors" if "word error" in name else "exact"
        result = evaluate(model, from_records(Manifest(path), rule={"name": rule}), features=cache)
        own = result.overall
        found[name] = {
            "n": result.n,
            "score": own.score,
            "ci95": list(own.ci95 or ()),
            "no_audio": own.no_audio_score,
            "by_task": {task: part.score for task, part in result.categories.get("task", {}).items()},
        }
    return found


@torch.inference_mode()
def text_answers(model: PalModel, max_new_tokens: int = 24) -> dict[str, Any]:
    """How far training changed the LLM where it hears nothing, with the adapters on and as `ask` answers.

    The reference are the greedy answers of the LLM without its adapters to `PROMPTS`: loss a token of these answers
    without and with adapters, and the share of prompts whose first sentence stays the same with adapters, and in `ask`.
    """
    rows = [encode(model.tokenizer, [{"role": "user", "content": prompt}], []) for prompt in PROMPTS]
    with adapters.disabled(model.llm):
        before = model.generate([], rows, max_new_tokens=max_new_tokens)
    after = model.generate([], rows, max_new_tokens=max_new_tokens)
    asked = [model.ask([], prompt, max_new_tokens=max_new_tokens) for prompt in tqdm(PROMPTS, desc="text alone")]
    records = [
        Record(id=str(i), clips=(), turns=(Turn(prompt, answer),), task="text", dataset="text")
        for i, (prompt, answer) in enumerate(zip(PROMPTS, before, strict=True))
    ]
    batch = Batch([], [encode(model.tokenizer, conversation_of(record), [], train=True) for record in records])
    with adapters.disabled(model.llm):
        base = model.loss(batch)
    own = model.loss(batch)
    return {
        "loss_before": float(base[0]) / base[1],
        "loss_after": float(own[0]) / own[1],
        "same_first_sentence": _same(before, after),
        "same_first_sentence_asked": _same(before, asked),
        "prompts": len(PROMPTS),
    }


def _same(a: list[str], b: list[str]) -> float:
    return sum(_first(x) == _first(y) for x, y in zip(a, b, strict=True)) / len(a)


def _first(text: str) -> str:
    """First sentence."""
    for end in (". ", ".\n", "! ", "? ", "\n"):
        text = text.split(end)[0]
    return text.strip()


def step_costs(runs: list[Path], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of a step of each run's last stage, in turns, on the first batch of the first run's."""
    models = {run.name: pal.load(run) for run in runs}
    recipe = load_recipe(Path(__file__).with_name(f"{runs[0].name}.yaml"))
    data = StageData(recipe, len(recipe.stages) - 1, open_sources(recipe, runs[0] / "data"))
    first = models[runs[0].name]
    data.start(first, AnswerLoss(first, AnswerLoss.Config()), WaveformCache(1 << 28))
    costs = training_costs(models, data.micro_batches(0, 0, 1)[0].batch, recipe.stages[-1], rounds)
    return {name: {"seconds": cost.step_seconds, "peak_bytes": cost.peak_bytes} for name, cost in costs.items()}


def measure(run: Path, curriculum: Path, features: Path, only: list[str] | None) -> dict[str, Any]:
    """All numbers of one run."""
    model = pal.load(run)
    cache = FeatureCache(features, model.ears, "bf16")
    report = json.loads((run / "train.json").read_text())
    return {
        "run": run.name,
        "scores": scores(model, curriculum, cache, only),
        "text": text_answers(model),
        "steps": sum(stage["steps"] for stage in report["stages"]),
        "trained_parameters": report["stages"][-1]["trained_parameters"],
    }


def table(found: list[dict[str, Any]], steps: dict[str, dict[str, float]]) -> str:
    """Markdown: a column for each run; `steps` as from `step_costs`."""
    lines = ["| | " + " | ".join(one["run"] for one in found) + " |", "|---|" + "---|" * len(found)]
    for name in (name for name in SETS if all(name in one["scores"] for one in found)):
        cells = []
        for one in found:
            own = one["scores"][name]
            low, high = own["ci95"]
            cells.append(f"{own['score']:.3f} ({low:.3f} to {high:.3f}), without audio {own['no_audio']:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, of in (
        (
            "text-only loss, before -> after",
            lambda one: f"{one['text']['loss_before']:.3f} -> {one['text']['loss_after']:.3f}",
        ),
        ("steps", lambda one: f"{one['steps']:,}"),
        ("a step, s", lambda one: f"{steps[one['run']]['seconds']:.2f}"),
        ("its peak memory, GB", lambda one: f"{steps[one['run']]['peak_bytes'] / 1e9:.2f}"),
        ("trained parameters", lambda one: f"{one['trained_parameters']:,}"),
    ):
        lines.append(f"| {name} | " + " | ".join(of(one) for one in found) + " |")
    return "\n".join(lines)


def draw_curves(figure: Any, logs: dict[str, list[dict[str, Any]]], steps: dict[str, dict[str, float]]) -> None:
    """Running means of the loss of each run's last stage over steps, and over minutes by the seconds of a step."""
    by_step, by_minute = figure.subplots(1, 2, sharey=True)
    for place, (name, lines) in enumerate(logs.items()):
        style = {**style_of(place), "marker": ""}
        own = [line for line in lines if line["stage"] == lines[-1]["stage"]]
        before = max((line["step"] for line in lines if line["stage"] != own[0]["stage"]), default=0)
        counts = [line["step"] - before for line in own]
        losses = smooth([line["loss"] for line in own], 0.8)
        by_step.plot(counts, losses, label=escape_label(name), **style)
        by_minute.plot([count * steps[name]["seconds"] / 60 for count in counts], losses, **style)
    by_step.set(xlabel="step of the joint stage", ylabel="loss a token, running mean", ylim=(0, None))
    by_minute.set(xlabel="minutes")
    by_step.legend(fontsize=8, frameon=False)


def main() -> None:
    """Measure the runs that are not measured yet; print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that pal train wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/real/held-out"))
    parser.add_argument("--only", nargs="+", choices=list(SETS), help="some of the held-out sets")
    parser.add_argument("--curriculum", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--features", type=Path, default=Path("runs/real/features"), help="the recipes' feature cache")
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for run in args.runs:
        path = args.out / f"{run.name}.json"
        if not path.is_file():
            write_json(path, measure(run, args.curriculum, args.features, args.only))
        found.append(json.loads(path.read_text()))
    steps_file = args.out / "steps.json"
    steps = json.loads(steps_file.read_text()) if steps_file.is_file() else {}
    if not {run.name for run in args.runs} <= steps.keys():
        steps = step_costs(args.runs)
        write_json(steps_file, steps)
    logs = {run.name: read_log(run / "log.jsonl") for run in args.runs}
    rendered = render(partial(draw_curves, logs=logs, steps=steps), (10.0, 4.0))
    if rendered is not None:
        write_bytes(args.out / "curves.png", rendered.png)
    print(table(found, steps))


if __name__ == "__main__":
    main()
