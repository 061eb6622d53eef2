"""Evaluation engine: answers every question of a benchmark and scores the answers, in memory or in a run folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from pal.audio import seconds
from pal.data.manifest import Manifest, Record
from pal.errors import AudioError, PalError
from pal.evaluate.answerer import Answerer, ItemPrompt, evaluation_mode
from pal.evaluate.benchmark import Benchmark, from_records
from pal.evaluate.folder import Answer, RunFolder
from pal.evaluate.items import Item
from pal.evaluate.result import ItemResult, Result
from pal.evaluate.rules.base import Rule
from pal.evaluate.scoring import score

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.types import EncodedClip

_PACKAGES = ("pal-audio", "torch", "transformers", "tokenizers", "numpy", "soundfile", "soxr")
_SCORING = ("scikit-learn", "jiwer", "whisper-normalizer", "pycocoevalcap", "sentence-transformers")

_Key = tuple[int, bool]
"""(index of an item, with audio)."""


@overload
def evaluate(
    model: PalModel,
    benchmark: Benchmark | Manifest | Sequence[Record],
    folder: None = None,
    *,
    no_audio: bool = True,
    limit: int | None = None,
    batch: int = 32,
    progress: bool = True,
    seed: int = 0,
    features: Callable[[str], EncodedClip] | None = None,
) -> Result: ...
@overload
def evaluate(
    model: PalModel,
    benchmark: Benchmark | Manifest | Sequence[Record],
    folder: str | Path | None,
    *,
    no_audio: bool = True,
    limit: int | None = None,
    batch: int = 32,
    progress: bool = True,
    seed: int = 0,
    features: Callable[[str], EncodedClip] | None = None,
    overwrite: bool = False,
) -> Result | None: ...
def evaluate(
    model: PalModel,
    benchmark: Benchmark | Manifest | Sequence[Record],
    folder: str | Path | None = None,
    *,
    no_audio: bool = True,
    limit: int | None = None,
    batch: int = 32,
    progress: bool = True,
    seed: int = 0,
    features: Callable[[str], EncodedClip] | None = None,
    overwrite: bool = False,
) -> Result | None:
    """Evaluate a model on a benchmark.

    With a folder, answers are saved there as they are generated. After a kill, the same call resumes the run: it
    answers only questions without an answer or with an error. Under `accelerate launch` every process takes a share of
    the clips.

    Args:
        model: set to evaluation mode during the call; with a folder also moved to this process's device.
        benchmark: questions with their scoring rule; records are scored by exact match of every turn (see
            `from_records`).
        folder: run folder, see `pal.evaluate.folder`; None: nothing is written.
        no_audio: also evaluate the same model without audio.
        limit: number of questions to evaluate, from the first on.
        batch: rows of a forward pass. Questions about one clip share its features, keys and values.
        progress: show a progress bar.
        seed: seed of the bootstrap.
        features: function from the path of a clip to its features, encoded alone, such as a
            `pal.features.FeatureCache`; default: run the encoders.
        overwrite: delete another run in the folder.

    Returns:
        The result; with a folder, None in all processes but the first. An item that raised counts as wrong and has
        its error.

    Raises:
        ConfigError: another run is in the folder, or the rule needs choices or a missing package.
        ManifestError: no questions, or with a folder two with the same id.
        PalError: every question raised an error.
    """
    questions = benchmark if isinstance(benchmark, Benchmark) else from_records(benchmark)
    items = questions.items[:limit]
    rule = questions.build_rule()  # a missing package raises before an hour of inference, not after
    prompts = [ItemPrompt.of(item, model.config.style) for item in items]
    answerer = Answerer(model, questions.ranked, batch, questions.max_new_tokens, features)
    conditions = (True, False) if no_audio else (True,)
    if folder is None:
        settings = _settings(model, questions, items, prompts[0], rule, limit, seed, no_audio)
        found = [
            (row, Answer(items[row].id, with_audio, text, error))
            for row, with_audio, text, error in _ask(answerer, prompts, range(len(items)), conditions, (), progress)
        ]
        texts = {(row, one.with_audio): one.text for row, one in found if one.text is not None}
        errors = {(row, one.with_audio): one.error for row, one in found if one.error is not None}
        return _result(questions, items, texts, errors, rule, settings)

    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    questions.check_ids()
    # unlike `Accelerator`, it ignores the launcher's variable for CPU runs, and would then count one process
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    model.to(state.device)
    run_folder = RunFolder(folder)
    settings = {}
    if state.is_main_process:
        settings = _settings(model, questions, items, prompts[0], rule, limit, seed, no_audio)
        run_folder.open(settings, overwrite)
        run_folder.drop_errors()
    state.wait_for_everyone()
    rows = {item.id: row for row, item in enumerate(items)}
    done = {(rows[name], with_audio) for name, with_audio in run_folder.answers()}
    state.wait_for_everyone()  # no process writes before all have read
    mine = _share(items, state.process_index, state.num_processes)
    with run_folder.journal(state.process_index) as journal:
        shown = progress and state.is_main_process
        for row, with_audio, text, error in _ask(answerer, prompts, mine, conditions, done, shown):
            journal.add([Answer(items[row].id, with_audio, text, error)])
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    texts = {(rows[name], with_audio): text for (name, with_audio), text in run_folder.answers().items()}
    errors = {(rows[name], with_audio): why for (name, with_audio), why in run_folder.errors().items()}
    result = _result(questions, items, texts, errors, rule, settings)
    run_folder.finish(result)
    return result


def scoring_packages() -> dict[str, str]:
    """Versions of the installed packages that scoring rules use."""
    return _versions(_SCORING)


def _ask(
    answerer: Answerer,
    prompts: Sequence[ItemPrompt],
    rows: Sequence[int],
    conditions: Sequence[bool],
    done: Collection[_Key],
    progress: bool,
) -> Iterator[tuple[int, bool, str | None, str | None]]:
    """Yield (index of the item, with audio, answer, error) for each of `rows` that is not done."""
    with evaluation_mode(answerer.model), torch.no_grad():
        for with_audio in conditions:
            left = [row for row in rows if (row, with_audio) not in done]
            for index, text, error in answerer.ask([prompts[row] for row in left], with_audio, progress):
                yield left[index], with_audio, None if error else text, error


def _result(
    benchmark: Benchmark,
    items: Sequence[Item],
    texts: Mapping[_Key, str],
    errors: Mapping[_Key, str],
    rule: Rule,
    settings: Mapping[str, Any],
) -> Result:
    if not any((row, True) in texts for row in range(len(items))):
        raise PalError(f"none of {len(items)} questions could be answered; the first: {errors[0, True]}")
    lengths: dict[tuple[str, ...], float | None] = {}
    results = []
    for row, item in enumerate(items):
        if item.clips not in lengths:
            lengths[item.clips] = _seconds(item.clips)
        output, no_audio_output = texts.get((row, True)), texts.get((row, False))
        results.append(
            ItemResult(
                id=item.id,
                clips=[_below(benchmark.root, clip) for clip in item.clips],
                category={axis: list(values) for axis, values in item.category.items()},
                seconds=lengths[item.clips],
                prompt=item.prompt,
                references=list(item.references),
                choices=None if settings["labels"] is not None or item.choices is None else list(item.choices),
                output=output,
                error=None if output is not None else errors.get((row, True)),
                no_audio_output=no_audio_output,
                no_audio_error=None if no_audio_output is not None else errors.get((row, False)),
                before=[{"question": turn.question, "answer": turn.answer} for turn in item.before],
            )
        )
    return score(results, rule, settings)


def _share(items: Sequence[Item], process: int, processes: int) -> list[int]:
    """Indices of the items of one process; items about the same clips stay together, to share their encoding."""
    places: dict[tuple[str, ...], int] = {}
    return [row for row, item in enumerate(items) if places.setdefault(item.clips, len(places)) % processes == process]


def _common_choices(items: Sequence[Item]) -> tuple[str, ...] | None:
    """The choices if they are the same for all items, to be written only once; else None."""
    first = items[0].choices
    return first if all(item.choices == first for item in items) else None


def _below(root: Path, clip: str) -> str:
    path = Path(clip)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _seconds(clips: Sequence[str]) -> float | None:
    """Length of the clips by their headers; None if one is unreadable, an error that its item reports."""
    try:
        return float(sum(seconds(clip) for clip in clips))
    except AudioError:
        return None


def _settings(
    model: PalModel,
    benchmark: Benchmark,
    items: Sequence[Item],
    prompt: ItemPrompt,
    rule: Rule,
    limit: int | None,
    seed: int,
    no_audio: bool,
) -> dict[str, Any]:
    """Settings that determine the answers, and facts for readers of a score."""
    greedy = f"greedy, at most {benchmark.max_new_tokens} new tokens"
    return {
        "benchmark": benchmark.name,
        "options": dict(benchmark.options),
        "limit": limit,
        "items": len(items),
        "left_out": benchmark.left_out,
        "data_digest": benchmark.digest,
        "root": str(benchmark.root.absolute()),
        "data_digest_of": "questions, references, choices, names and sizes of the clips",
        "model": model.source,
        "model_digest": model.digest,
        "dtype": str(model.llm.dtype).removeprefix("torch."),
        "system": model.config.system,
        "after_clip": model.config.after_clip,
        "prompt": prompt.shown(model),
        "asks": "rank" if benchmark.ranked else "generate",
        "decoding": "log-likelihood of each choice" if benchmark.ranked else greedy,
        "rule": dict(benchmark.rule),
        "parser": rule.describe(),
        "labels": _common_choices(items),
        "no_audio": no_audio,
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "scored_with": scoring_packages(),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: number for package in packages if (number := _version(package)) is not None}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
