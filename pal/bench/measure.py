"""Measured cost of a step: saved activations, peak memory, time."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pal.backbone.context import AudioContext
from pal.bench.flops import flop_counter
from pal.types import AUDIO, Batch, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.train.recipe import Stage


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps after `forward` for the backward pass.

    Each storage counts once and in full, however many operations saved a view of it.

    Args:
        forward: makes the loss; it must not run the backward pass.
        weights: parameters and buffers; they are there anyway and do not count.
    """
    held = _Held(weights)
    with held.hooks():
        graph = forward()
    del graph
    return held.total()


class _Held:
    """Tensors that autograd saves while its hooks are on."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._held: dict[int, Tensor] = {}

    def hooks(self) -> AbstractContextManager[None]:
        """Record the tensors saved inside the block, unchanged."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def total(self) -> int:
        """Bytes so far; lets go of the tensors."""
        found = sum(x.untyped_storage().nbytes() for address, x in self._held.items() if address not in self._own)
        self._held.clear()
        return found

    def _pack(self, tensor: Tensor) -> Tensor:
        # keeping the tensor keeps its address from being given to another one
        self._held.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most tensor memory that `step` holds at once, above what was allocated before it.

    On a GPU from the allocator's counters. On the CPU from the profiler's record of each allocation
    and release; unlike the resident size of the process this neither depends on what earlier steps
    left in the allocator nor counts loaded code.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    # the raw events; exporting a trace takes longer than most steps
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def quick_collection() -> Iterator[None]:
    """Garbage collection of what is made inside alone: imported modules are many objects, and it runs often here."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's C++ part writes to the standard error of the process, past Python; let it not."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Counts:
    """What can be counted of a step, and comes out alike however busy the machine is."""

    flops: int
    saved_bytes: int
    """Held for the backward pass at the end of the forward pass."""
    peak_bytes: int
    """The most at once above what was there before; gradients included."""


def counts(
    forward: Callable[[], Any],
    *,
    backward: Callable[[Any], object] | None = None,
    weights: Iterable[Tensor] = (),
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Counts:
    """Run a step once, and count.

    Args:
        forward: the step, or its forward pass.
        backward: given what `forward` returned, the rest.
        weights: parameters and buffers, which do not count as saved.
        device: where it runs.
        compiled: `forward` runs compiled code. Its operations cannot be seen, so they are counted in a run of its own
            in which nothing is compiled.
    """
    counter, held = flop_counter(), _Held(weights)

    def run() -> None:
        made = forward()
        if backward is not None:
            backward(made)

    if compiled:
        with torch.compiler.set_stance("force_eager"), counter:
            run()
        # compiles, which is not the step's own work, and cannot be done under the hooks below
        run()

    def step() -> None:
        with nullcontext() if compiled else counter:
            with held.hooks():
                made = forward()
            saved.append(held.total())
            if backward is not None:
                backward(made)

    saved: list[int] = []
    peak = peak_bytes(step, device)
    return Counts(counter.get_total_flops(), saved[-1], peak)


@dataclass(frozen=True)
class RoundSeconds:
    """Seconds of a step over several rounds."""

    median: float
    spread: float
    """From the first quartile to the third."""


def round_seconds(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    *,
    each: int = 1,
    done: Callable[[str], object] = lambda name: None,
) -> dict[str, RoundSeconds]:
    """Seconds of each step. They take turns, so that a busy moment of the machine hits all alike.

    Args:
        steps: by name; each has run before, so that what is made once is there.
        rounds: how often each runs.
        device: where.
        each: what one run of a step is divided by.
        done: called with a step's name after each of its runs.
    """
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - started) / each)
            done(name)
    return {name: RoundSeconds(statistics.median(found), _between_quartiles(found)) for name, found in times.items()}


def _between_quartiles(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def step_seconds(
    steps: Mapping[str, Callable[[], object]], rounds: int = 7, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median seconds of each step, after one round that is not counted: it pays for what is made once."""
    round_seconds(steps, 1, device)
    return {name: found.median for name, found in round_seconds(steps, rounds, device).items()}


@dataclass(frozen=True)
class TrainingCost:
    """Cost of one training step of a model."""

    saved_bytes: int
    """Activations kept for the backward pass."""
    peak_bytes: int
    """Most memory above weights and optimizer state, gradients included."""
    step_seconds: float
    """Median of one forward, backward and update."""
    trained_parameters: int


def training_costs(
    models: Mapping[str, PalModel], batch: Batch, stage: Stage, rounds: int = 7
) -> dict[str, TrainingCost]:
    """Costs of the same step for each model, measured in turns. The models' weights stay what they are.

    Args:
        models: by name; all on one device.
        batch: what the step trains on.
        stage: which parts it trains, in which precision.
        rounds: timed steps of each.
    """
    from pal.train.stages import freeze, set_modes

    steps: dict[str, Callable[[], None]] = {}
    saved, peaks, trained = {}, {}, {}
    was_training = {name: model.training for name, model in models.items()}
    needed_grad = {name: [p.requires_grad for p in model.parameters()] for name, model in models.items()}
    try:
        for name, model in models.items():
            parameters = [p for part in freeze(model, stage.train).values() for p in part.values()]
            model.llm.checkpoint_gradients(stage.gradient_checkpointing, recompute_audio=stage.recompute_audio)
            set_modes(model, stage)
            trained[name] = sum(p.numel() for p in parameters)
            forward, step = _training_step(model, batch, parameters, stage.precision)
            # The first step makes the optimizer's state, which stays and is not the step's own.
            step()
            weights = [*model.parameters(), *model.buffers()]
            saved[name] = saved_bytes(forward, weights)
            peaks[name] = peak_bytes(step, model.device)
            steps[name] = step
        seconds = step_seconds(steps, rounds, next(iter(models.values())).device)
    finally:
        for name, model in models.items():
            model.llm.checkpoint_gradients(False)
            for parameter, needs in zip(model.parameters(), needed_grad[name], strict=True):
                parameter.requires_grad_(needs)
                parameter.grad = None
            model.train(was_training[name])
    return {name: TrainingCost(saved[name], peaks[name], seconds[name], trained[name]) for name in models}


def _training_step(
    model: PalModel, batch: Batch, parameters: list[Parameter], precision: str
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    # A rate of 0 does all the work of an update and leaves the weights alone.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=model.device.type in ("cpu", "cuda"))

    def forward() -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            total, tokens = model.loss(batch)
        return total / tokens

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, step


def audio_cache_bytes(model: PalModel, samples_N: Tensor, row: Tokens) -> int:
    """Bytes of keys and values that a clip adds to decoding, whatever the integration.

    Audio K/V at their full resolution, plus the LLM's own cache for audio rows of the sequence.

    Args:
        model: any model.
        samples_N: the clip.
        row: a conversation about it.
    """
    with torch.inference_mode():
        inputs = model.inputs([samples_N], [row])
        stored = 0
        if isinstance(inputs.audio_context, AudioContext):
            built = [keys.built or {} for keys in inputs.audio_context.prebuilt().keys]
            stored = sum(tensor.nbytes for layers in built for pair in layers.values() for tensor in pair)
    llm = model.llm
    audio_rows = int(inputs.attention_mask_BT.sum()) - sum(token != AUDIO for token in row.ids)
    per_row = 2 * llm.n_layers * llm.kv_heads * llm.head_width * inputs.inputs_embeds_BTD.itemsize
    return stored + audio_rows * per_row
