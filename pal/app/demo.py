"""`pal demo`: trains PLITS, LAL and PAL on the same synthetic scenes, compares them and writes a report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import pal
from pal import SHIPPED, TEXT_LLM, shipped, train
from pal.bench.measure import audio_cache_bytes, training_costs
from pal.config import parse
from pal.data.collate import Collator
from pal.data.manifest import Manifest, Record
from pal.data.synth import synthesise
from pal.errors import BundleError
from pal.evaluate import Result, evaluate, from_records
from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.text import exact_match
from pal.files import write_json
from pal.report.demo import table, write_page
from pal.train.curves import read_log
from pal.train.recipe import Recipe, Stage, load_recipe

if TYPE_CHECKING:
    from pal.model import PalModel

METHODS = ("plits", "lal", "pal")
RECIPE = SHIPPED.with_name("demo.yaml")
QUESTIONS = ("What sound is this?", "Is there the sound of a dog?", "Is there the sound of rain?")
"""Questions about the real recording."""

_HELD_OUT_SEED, _FRESH_SEED = 900_001, 950_001
"""Seeds of scenes, far from those of training scenes; the demo's seed is added."""
HELD_OUT = {"scenes": 600, "questions_per_scene": 4}
_QUICK = {"scenes": 24, "questions_per_scene": 4}
_QUICK_SHARE = 0.04
"""Share of the recipe's steps and scenes with `--quick`."""
MEASURED_CLIPS = 16
"""Number of clips of the batch on which costs are measured."""


def run_demo(out: Path, quick: bool = False, seed: int = 0, recipe_path: Path = RECIPE) -> dict[str, Any]:
    """Run the demo. Finished parts in `out` are not repeated.

    Args:
        out: folder of the runs, `results.json` and `report.html`.
        quick: train for a fraction of the steps, to check that everything works.
        seed: seed of scenes, weights and order of the data.
        recipe_path: recipe that all integrations share.

    Returns:
        Content of `results.json`.

    Raises:
        PalError: `out` holds a demo with other options, or the shipped model is damaged.
    """
    console = Console(stderr=True)
    started = time.perf_counter()
    for folder in (SHIPPED, TEXT_LLM):
        if not (folder / "config.json").is_file():
            raise BundleError(f"{folder}: missing; run `pal doctor` for the remedy")
    console.rule("1/5 scenes")
    recipe = _with_scenes(scaled(load_recipe(recipe_path), quick), out / "scenes", seed)
    scene_options = _QUICK if quick else HELD_OUT
    held_out = Manifest(_scenes(out / "held-out", seed=_HELD_OUT_SEED + seed, **scene_options))

    models: dict[str, PalModel] = {}
    for name in METHODS:
        console.rule(f"2/5 training {name.upper()}")
        models[name] = _train(recipe, name, out / name)
    console.rule("3/5 evaluating on held-out scenes")
    scores = {name: _evaluate(model, held_out, out / name / "score.json") for name, model in models.items()}
    console.rule("4/5 measuring costs")
    stage = [stage for stage in recipe.stages if stage.objective == "answers"][-1]
    batch_records = _first_clips(held_out, MEASURED_CLIPS)
    measured = _costs(models, batch_records, stage)
    console.rule("5/5 a fresh scene")
    fresh_manifest = Manifest(_scenes(out / "fresh", scenes=12, seed=_FRESH_SEED + seed, questions_per_scene=8))
    fresh = _fresh_scene(models, fresh_manifest)
    recording = real_recording()

    results = {
        "pal_version": pal.__version__,
        "quick": quick,
        "seed": seed,
        "machine": _machine(),
        "seconds": round(time.perf_counter() - started, 1),
        "data": {
            "held_out_scenes": scene_options["scenes"],
            "held_out_questions": scores["plits"].n,
            "held_out_digest": held_out.digest,
            "measured_batch": {"clips": MEASURED_CLIPS, "questions": len(batch_records)},
        },
        "integrations": {
            name: {
                **_accuracy(scores[name], scores["plits"]),
                "cost": measured[name],
                "training": _training(out / name),
                "model": name,
                "model_digest": scores[name].settings["model_digest"],
            }
            for name in METHODS
        },
        "fresh_scene": fresh,
        "recording": recording,
    }
    write_json(out / "results.json", results)
    write_page(out / "report.html", results, Path(fresh_manifest.folder) / "audio" / fresh["file"])
    Console().print(table(results))
    _print_answers(console, fresh)
    if recording is not None:
        print_recording(console, recording)
    console.print(f"results: {out / 'results.json'}   page: {out / 'report.html'}", highlight=False)
    return results


# The recipe


def scaled(recipe: Recipe, quick: bool) -> Recipe:
    """The recipe, with fewer steps and scenes if `quick`."""
    if not quick:
        return recipe
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    for stage in fields["stages"]:
        for length in ("steps", "epochs"):
            if stage.get(length):
                share = stage[length] * _QUICK_SHARE
                stage[length] = max(1, round(share)) if length == "steps" else share
        stage["warmup"] = round(stage.get("warmup", 0) * _QUICK_SHARE)
    for source in fields["data"].values():
        if source.get("synth"):
            source["synth"]["scenes"] = max(16, round(source["synth"]["scenes"] * _QUICK_SHARE))
    return parse(Recipe, fields, where="the quick demo")


def _with_scenes(recipe: Recipe, folder: Path, seed: int) -> Recipe:
    """The recipe with generated scenes as manifests, shared by all integrations."""
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    for name, source in fields["data"].items():
        synth = recipe.data[name].synth
        if synth is None:
            continue
        options = {**synth.model_dump(), "seed": synth.seed + seed}
        del source["synth"]
        source["manifest"] = str(_scenes(folder / name, **options))
    fields["seed"] = recipe.seed + seed
    return parse(Recipe, fields, where="the demo")


def _with_integration(recipe: Recipe, integration: str) -> Recipe:
    """The recipe for one integration, which starts from the shipped encoder and text-only LLM."""
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    shipped = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))["model"]
    fields["model"] = {
        **fields.get("model", {}),
        "llm": {"path": str(TEXT_LLM)},
        "encoders": shipped["encoders"],
        "integration": {"name": integration},
        "after_clip": shipped.get("after_clip", "\n"),
    }
    fields["start"] = {"encoder": str(SHIPPED)}
    return parse(Recipe, fields, where=f"the demo's {integration}")


def _scenes(folder: Path, **options: Any) -> Path:
    """Manifest of synthetic scenes, generated unless an earlier run has generated the same ones."""
    manifest, made = folder / "manifest.jsonl", folder / "made.json"
    if manifest.is_file() and made.is_file() and json.loads(made.read_text(encoding="utf-8")) == options:
        return manifest
    path = synthesise(folder, **options)
    write_json(made, options)
    return path


def _train(recipe: Recipe, name: str, folder: Path) -> PalModel:
    try:
        return train.run(_with_integration(recipe, name), folder, resume=True)
    except SystemExit:
        print("run the demo again with the same options to resume it", file=sys.stderr)
        raise


# The results


def _evaluate(model: PalModel, held_out: Manifest, path: Path) -> Result:
    """Evaluation result; the saved one if model and data are the same."""
    benchmark = from_records(held_out, "held-out scenes")
    if path.is_file():
        with suppress(BundleError):  # written by an earlier version
            kept = Result.load(path)
            same = (kept.settings.get("model_digest"), kept.settings.get("data_digest"))
            if same == (model.digest, benchmark.digest):
                return kept
    result = evaluate(model, benchmark, batch=64)
    result.save(path)
    return result


def _accuracy(score: Result, baseline: Result) -> dict[str, Any]:
    """Accuracy, and the paired difference to a baseline on the same questions."""
    right = {item.id: bool(item.correct) for item in baseline.items}
    gains = [float(bool(item.correct)) - float(right[item.id]) for item in score.items]
    return {
        "accuracy": asdict(score.overall),
        "per_task": {task: asdict(part) for task, part in score.categories["task"].items()},
        "minus_plits": {
            "difference": sum(gains) / len(gains),
            "ci95": bootstrap_ci(gains, [item.group for item in score.items]),
        },
        "errors": len(score.errors),
    }


def _training(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    return {
        "seconds": report["seconds"],
        "step_seconds": report["stages"][-1]["median_step_seconds"],
        "steps": int(sum(stage["steps"] for stage in report["stages"])),
        "loss_curve": [[line["step"], line["loss"]] for line in read_log(folder / "log.jsonl")],
    }


def _first_clips(manifest: Manifest, clips: int) -> list[Record]:
    """Records about the first `clips` clips."""
    seen: dict[tuple[str, ...], None] = {}
    records = []
    for record in manifest:
        seen.setdefault(record.clips)
        if len(seen) > clips:
            break
        records.append(record)
    return records


def _costs(models: Mapping[str, PalModel], records: list[Record], stage: Stage) -> dict[str, dict[str, Any]]:
    any_model = next(iter(models.values()))
    collate = Collator(any_model.tokenizer, any_model.sampling_rate, style=any_model.config.style)
    batch, single = collate(records), collate(records[:1])
    costs = training_costs(models, batch, stage)
    return {
        name: {
            **asdict(costs[name]),
            "audio_kv_bytes": audio_cache_bytes(model, single.waveforms[0], single.conversations[0]),
            "audio_seconds": single.durations(model.sampling_rate)[0],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for name, model in models.items()
    }


def _fresh_scene(models: Mapping[str, PalModel], manifest: Manifest) -> dict[str, Any]:
    """Five questions about one scene, of different tasks, with reference answers and the answers of each model."""
    by_clip: dict[str, list[Record]] = {}
    for record in manifest:
        by_clip.setdefault(record.clips[0], []).append(record)
    # the scene with questions of the most tasks
    clip, records = max(by_clip.items(), key=lambda pair: len({record.task for record in pair[1]}))
    first_of_task = {record.task: record for record in reversed(records)}
    chosen = [*first_of_task.values(), *(record for record in records if record not in first_of_task.values())][:5]
    questions = [record.turns[0].question for record in chosen]
    answers = {name: model.ask(clip, questions) for name, model in models.items()}
    return {
        "file": Path(clip).name,
        "seed": manifest.path.parent.name,
        "events": _events(records[0]),
        "questions": [
            {
                "task": record.task,
                "question": record.turns[0].question,
                "truth": record.turns[0].answer,
                "answers": {name: answers[name][number] for name in models},
                "correct": {name: exact_match(answers[name][number], record.turns[0].answer) for name in models},
            }
            for number, record in enumerate(chosen)
        ],
    }


def real_recording() -> dict[str, Any] | None:
    """Answers of `smol` about a real recording; None where its pretrained models are not cached."""
    if shipped.default() != "smol":
        return None
    answers = pal.load("smol").ask(str(shipped.RECORDING), list(QUESTIONS))
    return {
        "file": shipped.RECORDING.name,
        "model": "smol",
        "questions": [
            {"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)
        ],
    }


def _events(record: Record) -> list[dict[str, Any]]:
    """Sound events of a scene by onset; tags with equal times, kind first, describe one event."""
    by_time: dict[tuple[float, float], list[str]] = {}
    for tag in record.tags or ():
        if tag.start is not None and tag.end is not None:
            by_time.setdefault((tag.start, tag.end), []).append(tag.label)
    return [
        {"label": ", ".join(labels), "start": start, "end": end} for (start, end), labels in sorted(by_time.items())
    ]


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "cpu_cores": cores, "gpu": gpu, "torch": torch.__version__}


def print_recording(console: Console, recording: dict[str, Any]) -> None:
    """Print the answers about the real recording."""
    console.print(f"\na real recording, {recording['file']}, asked of {recording['model']}:", highlight=False)
    for one in recording["questions"]:
        console.print(f"  {one['question']}  {one['answer']}", highlight=False, markup=False)


def _print_answers(console: Console, fresh: dict[str, Any]) -> None:
    console.print("\na fresh scene: " + "; ".join(event["label"] for event in fresh["events"]), highlight=False)
    for question in fresh["questions"]:
        answers = "   ".join(f"{name.upper()}: {answer}" for name, answer in question["answers"].items())
        console.print(f"  {question['question']}  [{question['truth']}]   {answers}", highlight=False, markup=False)
