"""`Trainer`: training loop over stages and steps, with exact resume."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from pal.data.collate import WaveformCache
from pal.errors import ConfigError, PalError
from pal.files import atomic_folder
from pal.memory import keep_freed_memory, peak_memory
from pal.model import PalModel
from pal.train import checkpoint, curves, optim, run_folder, stages
from pal.train.checkpoint import Checkpoint, State
from pal.train.distributed import HostReduce
from pal.train.master_weights import MasterWeights
from pal.train.meter import Meter, NonFiniteStep, new_totals, step_inputs
from pal.train.objectives import Objective, build_objective
from pal.train.operations import Operations, product_rate
from pal.train.prefetching import PrefetchLoader
from pal.train.recipe import Recipe, Stage
from pal.train.seeding import seed_everything
from pal.train.setup import build_model
from pal.train.skips import digests
from pal.train.sources import StageData, open_sources
from pal.train.step import Update, emulates_bf16
from pal.train.stopping import stop_signals

logger = logging.getLogger(__name__)

_CACHE_BYTES = 2 << 30
"""Maximum size of decoded audio in memory, over all sources and stages."""


class TrainingError(PalError):
    """NaN or infinite loss or gradient; names the step and its records."""


def run(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    on_stage: Callable[[PalModel], None] | None = None,
    read_every: int | None = None,
) -> PalModel:
    """Train and write into `out`: `model/` (the bundle), `log.jsonl`, `loss.png`, `train.json`, `checkpoints/`.

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
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        if self.accelerator.is_main_process:
            run_folder.claim(out, recipe, resume, overwrite)
        self.accelerator.wait_for_everyone()
        if read_every is None:
            read_every = 1 if self.accelerator.device.type == "cpu" else recipe.keep.log_every
        self.read_every = read_every
        self.host_reduce = HostReduce(self.accelerator.num_processes)
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
        self.waveforms = WaveformCache(_CACHE_BYTES)
        self.finished = resume and run_folder.is_finished(out)
        """True if the resumed run was already finished."""
        if self.finished:
            logger.info("%s is finished; nothing to do", out)
            self.model = PalModel.from_pretrained(out / "model")
            self.state = State()
            return
        with self.accelerator.main_process_first():
            self.manifests = open_sources(recipe, out / "data")
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
            TrainingError: the loss or gradient of a step is not finite. It is raised when the step is read, after the
                state before that step was saved.
            SystemExit: with status 130, after `stop`.
        """
        if self.finished:
            return
        found = checkpoint.load_newest(self.out / "checkpoints", self.recipe) if self.resume else None
        if found is not None:
            self._check_data(found)
            self.state = found.state
            logger.info("resuming after step %d (%s)", self.state.step, found.path)
        # set up completed stages again, since they may have added adapters to the model and names to `trained`
        for stage in self.recipe.stages[: self.state.stage]:
            self._set_up(stage)
        self.model.to(self.accelerator.device)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()  # else a step of a large vocabulary waits for pages longer than it computes
        self.peak = product_rate(self.accelerator.device)
        log = curves.Log(self.out / "log.jsonl", self.state.step) if self.accelerator.is_main_process else None
        try:
            with stop_signals(self.stop):
                if self.on_stage is not None:
                    self.on_stage(self.model)
                for index in range(self.state.stage, len(self.recipe.stages)):
                    yield from self._stage(index, found if index == self.state.stage else None, log)
                    found = None
                    if self.on_stage is not None:
                        self.on_stage(self.model)
        finally:
            if log is not None:
                log.close()

    def finish(self) -> PalModel:
        """Write the bundle, the loss curve and `train.json`; returns the model frozen and in evaluation mode."""
        if self.finished:
            return self.model
        self.model.eval().requires_grad_(False)
        changed = {stages.lasting_name(name) for name in self.model.trained} | self.trained
        self.model.trained = {name for name in self.model.state_dict() if stages.lasting_name(name) in changed}
        if self.accelerator.is_main_process:
            self.model.save_pretrained(self.out / "model")
            curves.draw({self.out.name: self.out / "log.jsonl"}, self.out / "loss.png")
            run_folder.write_report(
                self.out,
                self.recipe,
                self.state,
                self._seconds(),
                {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.parts().items()},
                processes=self.accelerator.num_processes,
                device=str(self.accelerator.device),
            )
        self.accelerator.wait_for_everyone()
        return self.model

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
        objective = build_objective(self.model, stage, data.records())
        if found is not None:
            _fill(self.model, objective, found)
        if objective.head():
            parameters["head"] = {f"{_HEAD}{name}": p for name, p in objective.head().items()}
        self.model.llm.checkpoint_gradients(stage.gradient_checkpointing, recompute_audio=stage.recompute_audio)
        objective.train()
        stages.set_modes(self.model, stage)
        data.start(self.model, objective, self.waveforms)
        accelerator = self.accelerator
        if stage.precision == "bf16" and emulates_bf16(accelerator.device):
            logger.warning(
                "stage '%s': this processor only emulates bfloat16, tens of times slower than float32; use --set "
                "stages.%d.precision=fp32, and another cache if the stage has one",
                stage.name,
                index,
            )
        compiled = stages.compiles(stage, accelerator.device)
        if compiled:
            logger.info(
                "stage '%s': its first step compiles the LLM's layers (compile: false turns it off)", stage.name
            )
            self.model.llm.compile()
        captured = stages.captures(stage, accelerator.device, accelerator.num_processes)
        self.model.llm.capture(captured)
        objective.to(accelerator.device)
        masters = _masters(parameters, stage)
        named = {name: p for part in masters.parts.values() for name, p in part.items()}
        optimizer = optim.adamw(optim.parameter_groups(masters.parts, stage), stage)
        if found is not None and found.optimizer:
            optim.load_optimizer_tensors(optimizer, named, found.optimizer)
            masters.give_weights()
        update = Update(accelerator.prepare(objective), optimizer, masters, stage, accelerator, self.host_reduce)

        if len(state.totals) == index:
            state.totals.append(new_totals() | {"trained_parameters": sum(p.numel() for p in named.values())})
        keep, total = self.recipe.keep, state.totals[index]
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
        operations = self._operations(stage)
        meter = Meter(objective.unit, total, None if operations is None else self.peak)
        ready = time.monotonic()
        with bar, closing(loader):
            for micro_batches in loader:
                loaded = time.monotonic()
                rates = optim.set_lr(
                    optimizer, optim.lr_factor(state.stage_step, data.steps, stage.warmup, stage.schedule)
                )
                seed_everything(self.recipe.seed, index, state.stage_step, accelerator.process_index)
                result = update(micro_batches, self.stop_requested, self._is_late())
                done = 0.0 if operations is None else operations(micro_batches)
                meter.add(
                    result, step_inputs(micro_batches, self.model.sampling_rate, objective.unit, done), loaded, ready
                )
                self.stop_agreed, self.checkpoint_due = result.flags
                state.step += 1
                state.stage_step += 1
                bar.update()
                last = state.stage_step == data.steps
                logs = last or self.stop_agreed or state.step % keep.log_every == 0
                due = self.stop_agreed or self.checkpoint_due or state.step % keep.checkpoint_every == 0
                saves = due and not last
                if logs or saves or state.step % self.read_every == 0:
                    fault = meter.read()
                    if fault is not None:
                        state.step -= fault.undone
                        state.stage_step -= fault.undone
                        raise TrainingError(_where(stage, state, fault, save()))
                if logs:
                    line = meter.line()
                    total["loss"] = line["loss"]
                    bar.set_postfix_str(f"loss {line['loss']:.3g}", refresh=False)
                    if log is not None:
                        log.write(step=state.step, stage=stage.name, lr=rates, **line, seconds=self._seconds())
                if saves:
                    path = save()
                    if self.stop_agreed:
                        self._leave(path)
                yield state.step
                ready = time.monotonic()
        total["median_step_seconds"] = meter.median()
        peak = peak_memory(self.model.llm.device)
        if peak is not None:
            total["peak_memory_bytes"] = peak
        self.model.llm.checkpoint_gradients(False)
        if compiled:  # the next stage may not compile, and the trained model is returned uncompiled
            self.model.llm.uncompile()
        self.model.llm.capture(False)
        accelerator.free_memory()
        if stage.save_llm and accelerator.is_main_process:
            with atomic_folder(self.out / "llm") as folder:
                self.model.llm.save(folder)
                self.model.tokenizer.save_pretrained(folder)
        state.stage, state.stage_step = index + 1, 0
        self._save(None, None, {}, None)
        if self.stop_agreed and index + 1 < len(self.recipe.stages):
            self._leave(self.out / "checkpoints")

    def _operations(self, stage: Stage) -> Operations | None:
        if self.peak is None:
            return None
        try:
            return Operations(self.recipe, stage, self.model)
        except PalError as error:
            logger.info("stage '%s': no 'mfu' in the log: %s", stage.name, error)
            return None

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
        """Write a checkpoint; without an objective, a checkpoint between two stages."""
        path = self.out / "checkpoints"
        if self.accelerator.is_main_process:
            tensors = stages.trained_weights(self.model, self.trained)
            if objective is not None:
                tensors |= {f"{_HEAD}{name}": p for name, p in objective.head().items()}
            state: dict[str, Tensor] = {}
            if optimizer is not None and masters is not None:
                state = optim.optimizer_tensors(optimizer, names, masters.copies)
            path = checkpoint.save(path, self.state, self.recipe, tensors, state, self.recipe.keep.checkpoints)
        self.saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()
        return path

    def _check_data(self, found: Checkpoint) -> None:
        for name, digest in found.state.data.items():
            if self.state.data.get(name) != digest:
                raise ConfigError(f"data '{name}' changed since the run was started; restore it, or start a new run")
        new = sorted(set(self.state.data) - set(found.state.data))
        if new:
            raise ConfigError(f"data '{new[0]}' was missing when the run was started; remove it, or start a new run")

    def _seconds(self) -> float:
        return round(sum(total["seconds"] for total in self.state.totals), 3)

    def _leave(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(
                f"stopped after step {self.state.step}, saved in {path}; continue with --resume", file=sys.stderr
            )
        raise SystemExit(130)


_HEAD = "head."


def _masters(parameters: dict[str, dict[str, nn.Parameter]], stage: Stage) -> MasterWeights:
    masters = MasterWeights(parameters, stage.master_weights)
    if stage.master_weights and not masters.copies:
        raise ConfigError(
            f"stage '{stage.name}': 'master_weights' needs trained weights in bfloat16, but there are none; set the "
            "model's 'llm.dtype' to bfloat16, or remove the key"
        )
    return masters


def _where(stage: Stage, state: State, fault: NonFiniteStep, saved: Path) -> str:
    records, more = fault.inputs.records, fault.inputs.more
    named = ", ".join(records) + (f" and {more} more" if more else "")
    return (
        f"stage '{stage.name}', step {state.stage_step}: {fault.what} is not finite; records: {named}. The state "
        f"before it is in {saved}; check these records by `pal data check`, or lower the learning rate"
    )


def _fill(model: PalModel, objective: Objective, found: Checkpoint) -> None:
    """Load a checkpoint's weights into the model and the objective."""
    own = stages.named_weights(model) | {f"{_HEAD}{name}": p for name, p in objective.head().items()}
    with torch.no_grad():
        for name, tensor in found.weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ConfigError(f"{found.path}: its '{name}' does not fit the model of the recipe; start a new run")
            own[name].copy_(tensor)
