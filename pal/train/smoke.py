"""`pal train RECIPE --smoke`: test run of a recipe with the same classes at toy size, from random weights.

Every stage runs two steps. The checks find in seconds what would fail late in a run of days: parts that do not fit, or
trained weights that do not change, frozen weights that do, a run that cannot be resumed, a model that cannot be loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal import bundle
from pal.errors import PalError
from pal.model import PalModel
from pal.model_config import ModelConfig, Part
from pal.registry import toy
from pal.train import stages
from pal.train.recipe import PARTS, BatchSize, CheckpointConfig, Recipe, Stage
from pal.train.source_config import Source, SynthSource
from pal.train.trainer import run

STEPS = 2
"""Steps of each stage: weights behind others that are initialised to zero get a gradient from the second step on."""
SCENES = 6
"""Number of synthetic scenes of each data source."""
SECONDS = 2.0
"""Length of a scene in seconds."""
QUESTION = "What do you hear?"


class SmokeError(PalError):
    """Fault found by the toy run of a recipe."""


@dataclass(frozen=True)
class SmokeCheck:
    """Passed check of the toy run."""

    name: str
    found: str
    """Observation in a few words."""


def smoke(recipe: Recipe, out: Path) -> Iterator[SmokeCheck]:
    """Run the toy version of a recipe in the folder `out`; yields each check when it has passed.

    Raises:
        SmokeError: a check failed.
        ConfigError: the recipe has no toy version.
    """
    if out.exists() and any(out.iterdir()):
        raise SmokeError(f"{out} is not empty; give another --out, or leave --out out")
    with _failing("the toy recipe"):
        small = toy_recipe(recipe)
    whole = out / "whole"
    weight_checks = _WeightChecks(small.stages)
    with _failing("training"):
        model = run(small, whole, on_stage=weight_checks)
    yield SmokeCheck("trained", f"{len(small.stages)} stages of {STEPS} steps")
    yield from weight_checks.checks
    with _failing("reading the bundle back"):
        again = PalModel.from_pretrained(whole / "model").to(model.device)
    _same(model.digest, again.digest, "the model's digest changes on saving and loading")
    yield SmokeCheck("saved and read back", f"digest {again.digest[:12]}")
    with _failing("asking"):
        clip = next((whole / "data").glob("*/audio/*.wav"))
        before, after = (one.ask(str(clip), QUESTION, max_new_tokens=8) for one in (model, again))
    _same(before, after, "the loaded model gives another answer")
    yield SmokeCheck("asked", f"the same answer before saving and after loading, {len(after)} characters")
    with _failing("resuming"):
        step = _cut(whole, out / "resumed")
        resumed = run(small, out / "resumed", resume=True)
    resumed_weights = resumed.state_dict()
    for name, tensor in model.state_dict().items():
        if not _equal(tensor, resumed_weights[name]):
            raise SmokeError(f"'{name}' differs between an uninterrupted run and one resumed after step {step}")
    how = "bit for bit" if model.device.type == "cpu" else "to round-off"
    yield SmokeCheck(
        "resumed", f"after step {step} of {STEPS * len(small.stages)}; the same weights as uninterrupted, {how}"
    )


def toy_recipe(recipe: Recipe) -> Recipe:
    """The recipe with small parts and generated data, and otherwise the same stages."""
    if recipe.bundle is not None:
        model, _ = bundle.read_architecture(recipe.bundle)
    else:
        assert recipe.model is not None
        model = recipe.model
    return Recipe(
        seed=recipe.seed,
        model=_toy_model(model),
        data={name: _toy_source(source, i) for i, (name, source) in enumerate(sorted(recipe.data.items()))},
        stages=[_toy_stage(stage) for stage in recipe.stages],
        # a checkpoint of every step, so that the run can resume from any of them
        keep=CheckpointConfig(checkpoint_every=1, checkpoints=STEPS * len(recipe.stages), log_every=1, workers=0),
    )


def _toy_model(model: ModelConfig) -> ModelConfig:
    connector: Part | list[Part]
    if isinstance(model.connector, list):
        connector = [_toy_connector(part) for part in model.connector]
    else:
        connector = toy("connector", model.connector)
    return ModelConfig(
        llm=model.llm.toy(),
        encoders=[toy("encoder", part) for part in model.encoders],
        connector=connector,
        integration=toy("integration", model.integration),
        system=model.system,
        after_clip=model.after_clip,
    )


def _toy_connector(part: Part) -> Part:
    options = dict(part)
    takes = {"encoders": options.pop("encoders")} if "encoders" in options else {}
    return toy("connector", options) | takes


def _toy_source(source: Source, number: int) -> Source:
    synth = SynthSource(scenes=SCENES, seed=number, seconds=SECONDS, questions_per_scene=4)
    return Source(synth=synth, weight=source.weight, repeat=source.repeat, augment=source.augment)


def _toy_stage(stage: Stage) -> Stage:
    # a long warm-up would leave the weights almost unchanged
    changes = {"steps": STEPS, "epochs": None, "warmup": min(stage.warmup, 1), "batch": _toy_batch(stage.batch)}
    changes["cache"] = None  # the folder belongs to the real encoders
    changes["compile"] = stage.compile is True  # compiling takes longer than the whole smoke run
    changes["cuda_graphs"] = False
    return Stage(**{**stage.model_dump(), **changes})


def _toy_batch(batch: BatchSize) -> BatchSize:
    accumulate = min(batch.accumulate, 2)

    def least(limit: float | None, size: float) -> Any:
        return None if limit is None else min(limit, size)

    return BatchSize(
        rows=least(batch.rows, 2 * accumulate),
        clips=least(batch.clips, 2 * accumulate),
        seconds=least(batch.seconds, 2 * accumulate * SECONDS),
        rows_per_clip=least(batch.rows_per_clip, 2),
        turns=min(batch.turns, 2),
        accumulate=accumulate,
        bucket=batch.bucket,
    )


class _WeightChecks:
    """Checks after each stage that trained weights changed and frozen ones did not."""

    def __init__(self, plan: list[Stage]) -> None:
        self._stages = iter(plan)
        self._before: dict[str, Tensor] | None = None
        self.checks: list[SmokeCheck] = []

    def __call__(self, model: PalModel) -> None:
        now = {name: tensor.detach().clone() for name, tensor in stages.named_weights(model).items()}
        if self._before is not None:
            self._compare(next(self._stages), model, self._before, now)
        self._before = now

    def _compare(self, stage: Stage, model: PalModel, before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
        free = {stages.lasting_name(name) for name, p in model.named_parameters() if p.requires_grad}
        # adapters added by the stage have no weights before it
        changed = {name for name, tensor in now.items() if name not in before or not torch.equal(tensor, before[name])}
        trained, frozen = 0, 0
        for part, names in _names(model).items():
            names &= set(now)
            moved = names & changed
            if not stage.train.part(part):
                wrong = moved
            else:
                # buffers of trained modules, such as batch statistics, may change
                wrong = {name for name in moved - free if name in dict(_frozen_parameters(model))}
                if not moved & free:
                    raise SmokeError(f"stage '{stage.name}' trains the {part}, but none of its weights changed")
                trained += len(moved & free)
            if wrong:
                raise SmokeError(f"stage '{stage.name}' changed '{sorted(wrong)[0]}', which it leaves frozen")
            frozen += len(names - free)
        self.checks.append(
            SmokeCheck(
                f"stage {stage.name}", f"{trained} of {len(free)} trained tensors changed, {frozen} frozen did not"
            )
        )


def _names(model: PalModel) -> dict[str, set[str]]:
    """Part -> checkpoint names of its weights and buffers."""
    own = {id(module): part for part, module in model.parts().items()}
    names: dict[str, set[str]] = {part: set() for part in PARTS}
    for prefix, module in model.named_modules():
        part = own.get(id(module))
        if part is not None:
            held = [*module.named_parameters(prefix=prefix), *module.named_buffers(prefix=prefix)]
            names[part] = {stages.lasting_name(name) for name, _ in held}
    return names


def _frozen_parameters(model: PalModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield stages.lasting_name(name), parameter


def _cut(whole: Path, folder: Path) -> int:
    """Copy a finished run up to its last checkpoint but one; returns the step of that checkpoint."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    (folder / "train.json").unlink()
    *_, kept, newest = sorted((folder / "checkpoints").glob("step*"))
    shutil.rmtree(newest)
    return int(kept.name.removeprefix("step"))


def _equal(a: Tensor, b: Tensor) -> bool:
    """True if tensors are equal: bit for bit on a CPU, to round-off on a GPU, whose order of summation varies."""
    if a.device.type == "cpu" or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4)


def _same(before: object, after: object, fault: str) -> None:
    if before != after:
        raise SmokeError(f"{fault}: '{before}' and '{after}'")


@contextmanager
def _failing(doing: str) -> Iterator[None]:
    """Turn any error in the block into a `SmokeError` of one line that starts with `doing`."""
    try:
        yield
    except PalError as error:
        raise SmokeError(f"{doing}: {error}") from error
    except Exception as error:  # any error is a finding of the smoke run
        first = (str(error).splitlines() or [""])[0]
        raise SmokeError(f"{doing}: {type(error).__name__}: {first}") from error
