"""`Trainer`: training loop over stages and steps, with exact resume."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pal.data.collate import WaveformCache
from pal.errors import TrainingError
from pal.files import atomic_folder
from pal.memory import FreedMemory, keep_freed_memory, peak_memory
from pal.model import PalModel
from pal.train import checkpoint, curves, optim, provenance, resuming, run_folder, stages, tracking
from pal.train.checkpoint import Checkpoint, State
from pal.train.disk import naming_disk_faults
from pal.train.distributed import ALONE
from pal.train.launcher import start_engine
from pal.train.master_weights import MasterWeights
from pal.train.meter import Meter, new_totals, step_inputs
from pal.train.objectives import Objective, build_objective
from pal.train.operations import operations_of, product_rate
from pal.train.prefetching import PrefetchLoader
from pal.train.quarantine import Quarantine
from pal.train.recipe import Recipe, Stage
from pal.train.saving import CheckpointSaver
from pal.train.seeding import seed_everything
from pal.train.setup import build_model, make_tokenizer
from pal.train.skipped_steps import SkippedSteps
from pal.train.skips import digests
from pal.train.sources import StageData, open_sources
from pal.train.step import Update, warn_of_emulation
from pal.train.stopping import stop_signals
from pal.train.validator import Validator

logger = logging.getLogger(__name__)

_CACHE_BYTES = 2 << 30
"""Maximum size of decoded audio in memory, over all sources and stages."""


def run(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    on_stage: Callable[[PalModel], None] | None = None,
    read_every: int | None = None,
) -> PalModel:
    """Train and write into `out`: `model/` (the bundle), `log.jsonl`, `loss.png`, `train.json`, `checkpoints/`.

    Where there is something to tell, also `quarantine.jsonl`, `skipped_steps.jsonl` and `best/` (docs/training.md).

    SIGINT and SIGTERM end the run after the current step with a checkpoint and exit status 130. Arguments and errors
    are those of `Trainer` and its `steps`.

    Returns:
        The trained model in evaluation mode, on the device it was trained on.
    """
    return Trainer(recipe, out, resume, overwrite, on_stage, read_every).fit()


class Trainer:
    """Training loop of a recipe: the model, the training state and the output files.

    `Trainer(recipe, out).fit()` does everything. `steps` yields after each step, so that the caller can inspect
    `model` and `state`, stop iterating, or request a checkpoint and exit with `stop`; `finish` writes the result.

    Args:
        recipe: recipe to run.
        out: folder of the run.
        resume: continue from the newest checkpoint; start from the beginning if there is none.
        overwrite: delete another run in `out`.
        on_stage: called with the model before the first stage of this call and after each stage.
        read_every: maximum number of steps between two reads of losses from the device; they are also read before
            every log line and checkpoint. Default: 1 on CPU, else `log_every`.

    Raises:
        ConfigError: the recipe is unusable, or `out` holds another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        resume: bool = False,
        overwrite: bool = False,
        on_stage: Callable[[PalModel], None] | None = None,
        read_every: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.out = out
        self.resume = resume
        self.on_stage = on_stage
        self.engine = start_engine(recipe.keep.engine)
        self.accelerator = self.engine.accelerator
        self.trackers = tracking.Trackers(recipe.keep.track)
        if self.accelerator.is_main_process:
            with naming_disk_faults(out):
                run_folder.claim(out, recipe, resume, overwrite)
        self.accelerator.wait_for_everyone()
        if read_every is None:
            read_every = 1 if self.accelerator.device.type == "cpu" else recipe.keep.log_every
        self.read_every = read_every
        place = (self.engine.host_reduce, self.accelerator.is_main_process)
        self.quarantine = Quarantine(out / "quarantine.jsonl", recipe.keep.max_bad, *place)
        self.skipped_steps = SkippedSteps(out / "skipped_steps.jsonl", *place)
        self.validator: Validator | None = None
        self.trained: set[str] = set()
        """Checkpoint names of the weights trained so far, over all stages."""
        self.stop_requested = False
        """True after `stop` was called in this process."""
        self.stop_agreed = False
        """True if any process requested a stop, so that all stop after the same step."""
        self.checkpoint_due = False
        """True if a checkpoint is due by the clock of any process, so that all take part in it."""
        self.peak: float | None = None
        """Measured FLOP/s of the device; None without CUDA."""
        self.saved_at = time.monotonic()
        # the best weights that the newest checkpoint knows are kept until there is a newer one
        forget_best = partial(checkpoint.remove_old, out / "best", 1)
        self.saver = CheckpointSaver(out / "checkpoints", recipe, after=forget_best)
        self.waveforms = WaveformCache(_CACHE_BYTES)
        self.finished = resume and run_folder.is_finished(out)
        """True if the resumed run was already finished."""
        if self.finished:
            logger.info("%s is finished; nothing to do", out)
            self.model = PalModel.from_pretrained(out / "model")
            self.state = State()
            return
        with self.accelerator.main_process_first(), naming_disk_faults(out):
            self.manifests = open_sources(recipe, out / "data")
            make_tokenizer(recipe, self.manifests, out)
        if recipe.validation is not None:
            ranks = (self.accelerator.process_index, self.accelerator.num_processes)
            self.validator = Validator(recipe.validation, recipe, self.manifests, self.engine.host_reduce, ranks)
        self.state = State(data=digests(recipe, self.manifests))
        seed_everything(recipe.seed, "model")
        self.model = build_model(recipe, self.manifests, out)

    def fit(self) -> PalModel:
        """Run all steps and `finish`; returns the trained model."""
        for _ in self.steps():
            pass
        return self.finish()

    def stop(self) -> None:
        """Request a checkpoint and SystemExit(130) after the current step, as a first SIGINT or SIGTERM does."""
        self.stop_requested = True

    def steps(self) -> Iterator[int]:
        """Train step by step; yields the number of completed steps of all stages.

        During the iteration SIGINT and SIGTERM call `stop`.

        Raises:
            ConfigError: the newest checkpoint does not fit, or a stage is unusable.
            TrainingError: more bad clips or steps that are not finite than the recipe's `keep` allows, raised after the
                state before was saved; or a disk that is full or cannot be written.
            SystemExit: with status 130, after `stop`.
        """
        if not self.finished:
            with naming_disk_faults(self.out), run_folder.locked(self.out, self.accelerator.is_main_process):
                yield from self._stages()

    def _stages(self) -> Iterator[int]:
        with self.accelerator.main_process_first():
            found = checkpoint.load_newest(self.saver.folder, self.recipe) if self.resume else None
        if found is not None:
            resuming.check_data(found, self.state.data)
            self.state = found.state
            logger.info("resuming after step %d (%s)", self.state.step, found.path)
        self._restore_lists()
        # set up completed stages again, since they may have added adapters to the model and names to `trained`
        for stage in self.recipe.stages[: self.state.stage]:
            self._set_up(stage)
        if found is not None and self.state.stage == len(self.recipe.stages):  # killed before `finish`
            resuming.fill(self.model, {}, found)
        self.engine.place(self.model)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()  # else a step of a large vocabulary waits for pages longer than it computes
        self.peak = product_rate(self.accelerator.device)
        log = self._open_log() if self.accelerator.is_main_process else None
        try:
            with stop_signals(self.stop):
                if self.on_stage is not None:
                    self.on_stage(self.model)
                for index in range(self.state.stage, len(self.recipe.stages)):
                    yield from self._stage(index, found if index == self.state.stage else None, log)
                    found = None
                    if self.on_stage is not None:
                        self.on_stage(self.model)
            self.saver.wait()
        finally:
            self.saver.close()
            for one in (log, self.quarantine, self.skipped_steps):
                if one is not None:
                    one.close()

    def _restore_lists(self) -> None:
        """Bring the lists of faults, and the best weights, to the step at which the run goes on."""
        state, limit = self.state, self.recipe.keep.max_nonfinite
        if state.nonfinite > limit:
            found = f"{state.nonfinite} steps were skipped, more than keep.max_nonfinite ({limit})"
            raise TrainingError(f"{found}; raise max_nonfinite")
        self.quarantine.restore(state.step)
        self.skipped_steps.restore(state.step)
        if self.accelerator.is_main_process:
            checkpoint.remove_later(self.out / "best", state.step)

    def finish(self) -> PalModel:
        """Write the bundle, the loss curve and `train.json`; returns the model frozen and in evaluation mode."""
        if self.finished:
            return self.model
        self.model.eval().requires_grad_(False)
        changed = {stages.lasting_name(name) for name in self.model.trained} | self.trained
        self.model.trained = {name for name in self.model.state_dict() if stages.lasting_name(name) in changed}
        if self.accelerator.is_main_process:
            with naming_disk_faults(self.out):
                self.model.save_pretrained(self.out / "model")
                curves.draw({self.out.name: self.out / "log.jsonl"}, self.out / "loss.png")
                run_folder.write_report(
                    self.out,
                    self.recipe,
                    self.state,
                    self._seconds(),
                    {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.parts().items()},
                    bad_clips=len(self.quarantine),
                    processes=self.accelerator.num_processes,
                    engine=self.engine.name,
                    device=str(self.accelerator.device),
                )
        self.accelerator.wait_for_everyone()
        return self.model

    def _open_log(self) -> curves.Log:
        """The log, followed by the trackers, after a note of what the run is started with."""
        device, processes = str(self.accelerator.device), self.accelerator.num_processes
        place = (self.out, self.recipe, self.state.data, self.state.step, self.model)
        started = provenance.record(*place, device=device, processes=processes)
        run = tracking.TrackedRun(self.out, self.recipe.model_dump(mode="json"), started)
        return curves.Log(self.out / "log.jsonl", self.state.step, self.trackers, run)

    # One stage

    def _set_up(self, stage: Stage) -> dict[str, dict[str, nn.Parameter]]:
        seed_everything(self.recipe.seed, f"stage {stage.name}")
        parameters = stages.freeze(self.model, stage.train)
        self.trained |= {stages.lasting_name(name) for part in parameters.values() for name in part}
        return parameters

    def _stage(self, index: int, found: Checkpoint | None, log: curves.Log | None) -> Iterator[int]:
        stage, state = self.recipe.stages[index], self.state
        parameters = self._set_up(stage)
        data = StageData(self.recipe, index, self.manifests)
        data.bad_clips = self.quarantine.errors
        objective = build_objective(self.model, stage, data.records())
        head = stages.head(objective)
        if found is not None:
            resuming.fill(self.model, head, found)
        if head:
            parameters["head"] = head
        self.model.llm.checkpoint_gradients(stage.gradient_checkpointing, recompute_audio=stage.recompute_audio)
        objective.train()
        stages.set_modes(self.model, stage)
        data.start(self.model, objective, self.waveforms)
        accelerator = self.accelerator
        if stage.precision == "bf16":
            warn_of_emulation(accelerator.device, stage.name, index)
        compiled = stages.compiles(stage, accelerator.device, self.engine.shards)
        if compiled:
            logger.info(
                "stage '%s': its first step compiles the LLM's layers (compile: false turns it off)", stage.name
            )
            self.model.llm.compile()
        captured = stages.captures(stage, accelerator.device, accelerator.num_processes)
        self.model.llm.capture(captured)
        trained_parameters = sum(p.numel() for part in parameters.values() for p in part.values())
        prepared, held = self.engine.prepare(objective, parameters, stage)
        masters, optimizer = self.engine.optimizer(held, stage)
        named = {name: p for part in masters.parts.values() for name, p in part.items()}
        if found is not None and found.optimizer:
            self.engine.load_optimizer(optimizer, named, masters, found.optimizer)
        if found is not None:
            found.close()
        keep = self.recipe.keep
        limits = (keep.max_nonfinite, state.nonfinite)
        update = Update(prepared, optimizer, masters, stage, self.engine, self.engine.host_reduce, *limits)
        if len(state.totals) == index:
            state.totals.append(new_totals() | {"trained_parameters": trained_parameters})
        total = state.totals[index]
        place = (accelerator.process_index, accelerator.num_processes)
        workers = keep.workers
        if workers is None:
            workers = 0 if accelerator.device.type == "cpu" and keep.loader == "threads" else 2
        loader = PrefetchLoader(data, state.stage_step, *place, workers, keep.prefetch, keep.loader == "processes")
        bar = tqdm(
            total=data.steps,
            initial=state.stage_step,
            desc=f"{index + 1}/{len(self.recipe.stages)} {stage.name}",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            disable=not accelerator.is_main_process,
        )
        save = partial(self._save, objective, optimizer, {id(p): name for name, p in named.items()}, masters)
        operations = operations_of(self.recipe, stage, self.model) if self.peak is not None else None
        meter = Meter(objective.unit, total, self.peak if operations else None, keep.max_nonfinite - state.nonfinite)
        validation: dict[str, Any] = {}
        ready, freed = time.monotonic(), FreedMemory()
        with bar, closing(loader):
            for micro_batches in loader:
                loaded = time.monotonic()
                left_out, excess = self.quarantine.meet(
                    state.step + 1, [one for micro_batch in micro_batches for one in micro_batch.left_out]
                )
                if excess is not None:
                    self._read(meter, stage, save)
                    save()
                    raise TrainingError(excess)
                factor = optim.lr_factor(state.stage_step, data.steps, stage.warmup, stage.schedule)
                rates = optim.set_lr(optimizer, factor)
                seed_everything(self.recipe.seed, index, state.stage_step, accelerator.process_index)
                result = update(self.engine.aligned(micro_batches), self.stop_requested, self._is_late())
                done = 0.0 if operations is None else operations(micro_batches)
                inputs = step_inputs(micro_batches, self.model.sampling_rate, objective.unit, done, left_out)
                meter.add(result, inputs, loaded, ready)
                freed.check()
                self.stop_agreed, self.checkpoint_due = result.flags
                state.step += 1
                state.stage_step += 1
                bar.update()
                last = state.stage_step == data.steps
                validates = self.validator is not None and self.validator.is_due(stage, state.stage_step, last)
                logs = last or validates or self.stop_agreed or state.step % keep.log_every == 0
                due = self.stop_agreed or self.checkpoint_due or state.step % keep.checkpoint_every == 0
                if logs or due or state.step % self.read_every == 0:
                    self._read(meter, stage, save)
                if validates and self.validator is not None:
                    validation, ends = self.validator(self.model, state, index, self._save_best, self.engine.whole)
                    last = last or ends
                    meter.restart()
                saves = due and not last
                if logs and meter.has_line:
                    line = meter.line() | validation
                    validation = {}
                    total["loss"] = line["loss"]
                    bar.set_postfix_str(f"loss {line['loss']:.3g}{self._faults()}", refresh=False)
                    if log is not None:
                        log.write(step=state.step, stage=stage.name, lr=rates, **line, seconds=self._seconds())
                self.saver.check()
                if saves:
                    path = save()
                    if self.stop_agreed:
                        self._leave(path)
                yield state.step
                if last:
                    break
                ready = time.monotonic()
        total["median_step_seconds"] = meter.median()
        peak = peak_memory(self.model.llm.device)
        if peak is not None:
            total["peak_memory_bytes"] = peak
        self.model = self.engine.release(self.model)
        self.model.llm.checkpoint_gradients(False)
        if compiled:  # the next stage may not compile, and the trained model is returned uncompiled
            self.model.llm.uncompile()
        self.model.llm.capture(False)
        accelerator.free_memory()
        best = None if self.validator is None else self.validator.best_weights(self.out / "best", state, index)
        if best is not None:
            resuming.fill(self.model, stages.head(objective), best)
            best.close()
        if stage.save_llm and accelerator.is_main_process:
            with atomic_folder(self.out / "llm") as folder:
                self.model.llm.save(folder)
                self.model.tokenizer.save_pretrained(folder)
        state.stage, state.stage_step = index + 1, 0
        self._save(None, None, {}, None)
        if self.stop_agreed and index + 1 < len(self.recipe.stages):
            self._leave(self.saver.folder)

    def _read(self, meter: Meter, stage: Stage, save: Callable[[], Path]) -> None:
        """Read the pending steps; raise TrainingError after saving, if one non-finite step too many is among them."""
        excess = self.skipped_steps.read(meter, stage.name, self.state)
        if excess is not None:
            remedy = "check these records by `pal data check`, or lower the learning rate"
            raise TrainingError(f"{excess}. The state before it is in {save()}; {remedy}")

    def _faults(self) -> str:
        """Numbers of faults so far, for the progress line."""
        bad, skipped = len(self.quarantine), self.state.nonfinite
        return (f", bad clips: {bad}" if bad else "") + (f", skipped steps: {skipped}" if skipped else "")

    # Checkpoints

    def _is_late(self) -> bool:
        limit = self.recipe.keep.checkpoint_seconds
        return limit is not None and time.monotonic() - self.saved_at > limit

    def _save(
        self,
        objective: Objective | None,
        optimizer: torch.optim.Optimizer | None,
        names: dict[int, str],
        masters: MasterWeights | None,
    ) -> Path:
        """Copy a checkpoint, to be written in a thread; without an objective, a checkpoint between two stages."""
        engine, path = self.engine, self.saver.folder
        if objective is None or optimizer is None or masters is None:  # each process has the whole model
            if self.accelerator.is_main_process:
                path = self.saver.save(self.state, stages.trained_weights(self.model, self.trained), {}, ALONE)
        elif engine.writers is not None:
            engine.settle()
            tensors = stages.trained_weights(self.model, self.trained) | stages.head(objective)
            state = engine.optimizer_shards(optimizer, names, masters)
            path = self.saver.save(self.state, engine.weight_shards(tensors), state, engine.writers)
        self.saved_at = time.monotonic()
        return path

    def _save_best(self) -> None:
        """Write the weights that are the stage's best so far."""
        writers = self.engine.writers
        if writers is None:
            return
        if writers.count > 1:
            self.saver.wait()  # its thread may exchange by the same group
        self.engine.settle()
        weights = self.engine.weight_shards(stages.trained_weights(self.model, self.trained))
        checkpoint.save(self.out / "best", self.state, self.recipe, weights, {}, sys.maxsize, writers)

    def _seconds(self) -> float:
        return round(sum(total["seconds"] for total in self.state.totals), 3)

    def _leave(self, path: Path) -> None:
        self.saver.wait()
        if self.accelerator.is_main_process:
            tqdm.write(
                f"stopped after step {self.state.step}, saved in {path}; continue with --resume", file=sys.stderr
            )
        raise SystemExit(130)
