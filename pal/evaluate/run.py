"""Runs a benchmark into a folder: resumable, several processes, scored at the end or again later."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pal.audio import seconds
from pal.errors import AudioError, ConfigError, PalError
from pal.evaluate.benchmark import Benchmark, changed_rule
from pal.evaluate.folder import Answer, RunFolder
from pal.evaluate.items import Item
from pal.evaluate.result import Answered, Result, score
from pal.evaluate.rules.base import Rule
from pal.evaluate.runner import Answerer, Question, evaluation_mode, question_of, shown_prompt
from pal.evaluate.tasks.base import Task
from pal.registry import build, lookup, names

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.types import Heard

_PACKAGES = ("pal-audio", "torch", "transformers", "tokenizers", "numpy", "soundfile", "soxr")
_SCORING = ("scikit-learn", "jiwer", "whisper-normalizer", "pycocoevalcap", "sentence-transformers")


def run(
    model: PalModel,
    benchmark: Benchmark,
    folder: str | Path,
    *,
    no_audio: bool = True,
    limit: int | None = None,
    batch: int = 32,
    progress: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    features: Callable[[str], Heard] | None = None,
) -> Result | None:
    """Ask every question of a benchmark and write the run's folder.

    Killed at any moment, the same call goes on where it was; only what was not answered, or raised,
    is asked. Under `accelerate launch` every process asks its share of the clips.

    Args:
        model: the model; put on this process's device, and in evaluation mode for the while.
        benchmark: what is asked, and by which rule it is scored.
        folder: of this run; see `pal.evaluate.folder`.
        no_audio: also ask the same model every question without its audio.
        limit: only the first so many questions.
        batch: rows in a forward pass. Questions about one clip share its encoding and its keys and values.
        progress: show a bar with the time left.
        seed: of the bootstrap.
        overwrite: forget another run in the folder.
        features: gives a clip as the model's encoders hear it by itself, such as a `pal.features.FeatureCache`;
            without it they are run.

    Returns:
        The score; None in all processes but the first.

    Raises:
        ConfigError: another run is in the folder, or the rule needs a package that is not there.
        PalError: every single question raised.
    """
    from accelerate import PartialState

    state = PartialState()
    items = benchmark.items[:limit]
    rule = benchmark.build_rule()  # a missing package is said before an hour of answers, not after
    model.to(state.device)
    kept = RunFolder(folder)
    questions = [question_of(item, model.config.system) for item in items]
    if state.is_main_process:
        kept.open(_settings(model, benchmark, items, questions[0], rule, limit, seed, no_audio), overwrite)
        kept.forget_errors()
    state.wait_for_everyone()
    done = kept.answers()
    state.wait_for_everyone()  # nobody writes before all have read
    mine = _share(items, state.process_index, state.num_processes)
    answerer = Answerer(model, "rank" if benchmark.ranked else "exact", batch, benchmark.max_new_tokens, features)
    with evaluation_mode(model), torch.no_grad(), kept.journal(state.process_index) as journal:
        for heard in (True, False) if no_audio else (True,):
            open_ones = [questions[row] for row in mine if (items[row].id, heard) not in done]
            ask = answerer.with_audio if heard else answerer.without_audio
            for index, text, error in ask(open_ones, progress and state.is_main_process):
                journal.add([Answer(open_ones[index].id, heard, None if error else text, error)])
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    answers, errors = kept.answers(), kept.errors()
    if not any((item.id, True) in answers for item in items):
        first = errors[items[0].id, True]
        raise PalError(f"none of {len(items)} questions could be answered; the first: {first}")
    labels = _common_choices(items)
    answered = [_answered(item, benchmark.root, labels, answers, errors) for item in items]
    result = score(benchmark.name, answered, labels, rule, seed, no_audio)
    kept.finish(result)
    return result


def rescore(folder: str | Path, rule: Mapping[str, Any] | None = None) -> Result:
    """Score the answers of a complete run again, without the model.

    Args:
        folder: of the run; its items and score are written anew.
        rule: another rule by its `name` ("official" is the benchmark's own), or options that change the run's.

    Raises:
        BundleError: no complete run.
        ConfigError: the rule does not fit the answers.
    """
    kept = RunFolder(folder)
    settings = kept.settings()
    before, wanted = settings["rule"], dict(rule or {})
    if wanted.get("name") == "official":
        del wanted["name"]
        before = {"name": "exact"}
        if settings["benchmark"] in names("task"):
            task: type[Task] = lookup("task", settings["benchmark"])
            before = dict(task.rule)
    chosen = changed_rule(before, wanted)
    if (chosen["name"] == "rank") != (settings["asks"] == "rank"):
        raise ConfigError(f"{folder}: the answers were made by '{settings['asks']}', which this rule cannot score")
    built: Rule = build("rule", chosen)
    result = score(
        settings["benchmark"], kept.items(), settings["labels"], built, settings["seed"], settings["no_audio"]
    )
    parser = built.describe()
    kept.open({**settings, "rule": chosen, "parser": parser, "scored_with": _versions(_SCORING)})
    kept.finish(result)
    return result


def join(folders: Sequence[str | Path], out: str | Path, overwrite: bool = False) -> Result:
    """Several runs of different questions of one benchmark as one, such as five folds with a model each.

    Raises:
        ConfigError: they differ in more than the model and the questions' choice, or share a question.
    """
    runs = [RunFolder(folder) for folder in folders]
    settings = [one.settings() for one in runs]
    first = settings[0]
    for key in ("benchmark", "asks", "system", "decoding", "rule", "labels", "no_audio", "versions"):
        other = [str(run.path) for run, its in zip(runs, settings, strict=True) if its[key] != first[key]]
        if other:
            raise ConfigError(f"{other[0]} and {runs[0].path} cannot be joined: '{key}' differs")
    answered = [item for run in runs for item in run.items()]
    if len({item.id for item in answered}) != len(answered):
        raise ConfigError(f"{runs[0].path} and the others share questions; join runs of different ones")
    rule: Rule = build("rule", first["rule"])
    result = score(first["benchmark"], answered, first["labels"], rule, first["seed"], first["no_audio"])
    per_run = ("options", "limit", "data_digest", "root", "model", "model_digest", "prompt")
    lists = {key: [its.get(key) for its in settings] for key in per_run}
    joined = {**first, **lists, "joined": [str(f) for f in folders]}
    kept = RunFolder(out)
    kept.open(joined, overwrite)
    kept.finish(result)
    return result


def _share(items: Sequence[Item], process: int, processes: int) -> list[int]:
    """The items of one process: whole clips, so that their encoding stays shared."""
    places: dict[tuple[str, ...], int] = {}
    return [row for row, item in enumerate(items) if places.setdefault(item.clips, len(places)) % processes == process]


def _common_choices(items: Sequence[Item]) -> tuple[str, ...] | None:
    """The choices of all items where they are the same, which are then written once."""
    first = items[0].choices
    return first if all(item.choices == first for item in items) else None


def _answered(
    item: Item,
    root: Path,
    labels: tuple[str, ...] | None,
    answers: Mapping[tuple[str, bool], str],
    errors: Mapping[tuple[str, bool], str],
) -> Answered:
    output, deaf = answers.get((item.id, True)), answers.get((item.id, False))
    return Answered(
        id=item.id,
        clips=[_below(root, clip) for clip in item.clips],
        category={axis: list(values) for axis, values in item.category.items()},
        seconds=_seconds(item.clips),
        prompt=item.prompt,
        references=list(item.references),
        choices=None if labels is not None or item.choices is None else list(item.choices),
        output=output,
        error=None if output is not None else errors.get((item.id, True)),
        no_audio_output=deaf,
        no_audio_error=None if deaf is not None else errors.get((item.id, False)),
        before=[{"question": turn.question, "answer": turn.answer} for turn in item.before],
    )


def _below(root: Path, clip: str) -> str:
    path = Path(clip)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _seconds(clips: Sequence[str]) -> float | None:
    """Length by the headers; None where one cannot be read, which its item reports."""
    try:
        return float(sum(seconds(clip) for clip in clips))
    except AudioError:
        return None


def _settings(
    model: PalModel,
    benchmark: Benchmark,
    items: Sequence[Item],
    question: Question,
    rule: Rule,
    limit: int | None,
    seed: int,
    no_audio: bool,
) -> dict[str, Any]:
    """What decides the answers, and what the reader of a score wants to know."""
    greedy = f"greedy, at most {benchmark.max_new_tokens} new tokens"
    return {
        "benchmark": benchmark.name,
        "options": dict(benchmark.options),
        "limit": limit,
        "items": len(items),
        "data_digest": benchmark.digest,
        "root": str(benchmark.root.absolute()),
        "data_digest_of": "questions, references, choices, names and sizes of the clips",
        "model": model.source,
        "model_digest": model.digest,
        "dtype": str(next(model.llm.parameters()).dtype).removeprefix("torch."),
        "system": model.config.system,
        "prompt": shown_prompt(model, question),
        "asks": "rank" if benchmark.ranked else "generate",
        "decoding": "log-likelihood of each choice" if benchmark.ranked else greedy,
        "rule": dict(benchmark.rule),
        "parser": rule.describe(),
        "labels": _common_choices(items),
        "no_audio": no_audio,
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "scored_with": _versions(_SCORING),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
