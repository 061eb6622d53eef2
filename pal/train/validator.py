"""`Validator`: answers of the model in training to held-out questions, scored by the evaluator's rule."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pal.data.manifest import Manifest, Record
from pal.data.record_source import RecordSource
from pal.errors import ConfigError
from pal.evaluate.answerer import Answerer, ItemPrompt
from pal.evaluate.benchmark import from_records
from pal.model import PalModel
from pal.train import checkpoint
from pal.train.checkpoint import Checkpoint, State
from pal.train.distributed import HostReduce
from pal.train.held_out import is_held_out
from pal.train.recipe import Recipe, Stage
from pal.train.sampler import permutation
from pal.train.skips import rows_to_skip
from pal.train.validation import Validation, best_score, ends_early

logger = logging.getLogger(__name__)


class Validator:
    """Validation of a run: accuracy by exact match of generated answers.

    The questions are drawn once, by the recipe's seed. Each process answers those about its share of the clips, and all
    learn the same accuracy. The answers do not depend on the batch (`pal.evaluate.answerer`), and a validation changes
    nothing in the model.

    Args:
        settings: validation settings of the recipe.
        recipe: recipe of the run.
        manifests: manifests of its sources, without missing optional ones.
        host_reduce: exchange between the processes, all of which call the same methods.
        process: (index, number of processes).

    Raises:
        ConfigError, ManifestError: there are no questions.
    """

    def __init__(
        self,
        settings: Validation,
        recipe: Recipe,
        manifests: Mapping[str, RecordSource],
        host_reduce: HostReduce,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.settings = settings
        self.recipe = recipe
        records = _records(settings, recipe, manifests)
        self.benchmark = from_records(records, "validation")
        if self.benchmark.left_out:
            logger.info("validation: %d records without choices are left out", self.benchmark.left_out)
        found = self.benchmark.items
        chosen = permutation(len(found), recipe.seed, "validation")[: settings.questions]
        self.items = [found[i] for i in sorted(chosen.tolist())]
        self._rule = self.benchmark.build_rule()
        self._host_reduce = host_reduce
        places: dict[tuple[str, ...], int] = {}
        part, parts = process
        self._mine = [
            i for i, one in enumerate(self.items) if places.setdefault(one.clips, len(places)) % parts == part
        ]

    def is_due(self, stage: Stage, step: int, last: bool) -> bool:
        """True after these completed steps of a stage; `last` is True after the stage's last one."""
        stages = self.settings.stages
        validated = stage.objective == "answers" if stages is None else stage.name in stages
        return validated and (last or step % self.settings.every == 0)

    def __call__(
        self,
        model: PalModel,
        state: State,
        index: int,
        save_best: Callable[[], object],
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[dict[str, Any], bool]:
        """Validate after a step, and note the accuracy in the state.

        Args:
            model: model in training.
            state: state of the run after the step.
            index: index of the stage.
            save_best: called if the accuracy is the stage's best so far.
            whole: context manager in which the model can be asked, `TrainingEngine.whole`.

        Returns:
            What a line of the log says of it, as `validation`; and True if the stage ends early.
        """
        began = time.monotonic()
        with whole():
            result = self.ask(model)
        accuracy, questions = result["accuracy"], len(self.items)
        state.validations.append({"stage": index, "step": state.step, "accuracy": accuracy, "questions": questions})
        best = best_score(state.validations, index)
        assert best is not None
        if best["step"] == state.step:
            save_best()
        accuracies = (accuracy, questions, best["accuracy"], best["step"])
        logger.info("step %d: accuracy %.3f on %d questions; best %.3f at step %d", state.step, *accuracies)
        for sample in result["samples"]:
            logger.info("  %(question)s -> %(answer)s (expected: %(expected)s)", sample)
        ends = ends_early(state.validations, index, self.settings.patience)
        if ends:
            logger.info("the stage ends: no better accuracy in %d validations", self.settings.patience)
        return {"validation": {**result, "seconds": round(time.monotonic() - began, 3)}}, ends

    def best_weights(self, folder: Path, state: State, index: int) -> Checkpoint | None:
        """The best weights of a stage at its end, from a folder of checkpoints; noted in the stage's totals.

        None if the last ones are the best, or if the settings ask for the last; with a warning, if they are damaged.
        """
        best = best_score(state.validations, index)
        if self.settings.model == "last" or best is None or best["step"] == state.step:
            return None
        found = checkpoint.load_newest(folder, self.recipe)
        if found is None or found.state.step != best["step"]:
            logger.warning("the best weights, of step %d, are damaged or missing; the last are kept", best["step"])
            return None
        logger.info("the stage ends with the weights of step %d, its best", best["step"])
        state.totals[index]["weights_of_step"] = best["step"]
        return found

    def ask(self, model: PalModel) -> dict[str, Any]:
        """Ask all questions.

        Returns:
            `accuracy`; `no_audio_accuracy`, if the settings ask for it; and `samples`, the first questions with their
            answers.
        """
        with _evaluating(model):
            texts = self._ask(model, with_audio=True)
            line = {"accuracy": self._accuracy(texts)}
            if self.settings.no_audio:
                line["no_audio_accuracy"] = self._accuracy(self._ask(model, with_audio=False))
        samples = [
            {"question": self.items[i].prompt, "answer": texts[i], "expected": list(self.items[i].references)}
            for i in self._mine
            if i < self.settings.samples
        ]
        gathered = self._host_reduce.gather(json.dumps(samples))
        return {**line, "samples": [sample for text in gathered for sample in json.loads(text)]}

    def _ask(self, model: PalModel, with_audio: bool) -> dict[int, str | None]:
        """Item of this process -> raw answer, or None with a warning for one that raised."""
        settings = self.settings
        answerer = Answerer(model, self.benchmark.ranked, settings.batch, settings.max_new_tokens, features=None)
        prompts = [ItemPrompt.of(self.items[i], model.config.style) for i in self._mine]
        texts: dict[int, str | None] = {}
        failed = []
        for at, text, error in answerer.ask(prompts, with_audio):
            texts[self._mine[at]] = None if error else text
            failed += [error] if error else []
        if failed:
            logger.warning(
                "validation: %d of %d questions count as wrong, since they cannot be asked: %s",
                len(failed),
                len(prompts),
                failed[0],
            )
        return texts

    def _accuracy(self, texts: Mapping[int, str | None]) -> float:
        verdict = self._rule.judge([self.items[i] for i in texts], list(texts.values()))
        right, asked = self._host_reduce.sum(sum(map(bool, verdict.correct)), len(texts))
        return right / asked


def _records(settings: Validation, recipe: Recipe, manifests: Mapping[str, RecordSource]) -> list[Record]:
    """All records of the validation's manifest, or those that the sources hold out."""
    if settings.manifest is not None:
        if not settings.manifest.is_file():
            raise ConfigError(f"validation: no '{settings.manifest}'; correct the path")
        return list(Manifest(settings.manifest, root=settings.root))
    assert settings.share is not None
    records = []
    for name, manifest in manifests.items():
        source = recipe.data[name]
        skipped = rows_to_skip(name, source, manifest)
        records += [
            record
            for row, record in enumerate(manifest)
            if row not in skipped
            and source.takes(record.task, record.dataset)
            and is_held_out(record, manifest, settings.share)
        ]
    if not records:
        raise ConfigError(f"validation: a share of {settings.share:g} holds out no clip; set a larger 'share'")
    return records


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients in the block; then each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
