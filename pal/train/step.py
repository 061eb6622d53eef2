"""Optimizer steps without host synchronisation.

The results of a step (loss, gradient norm, hits) stay on the device until `meter` reads them, and control flow depends
only on numbers known on the host, such as the count of trained tokens. So the host can launch a step while the device
still computes the previous one.
"""

from __future__ import annotations

import logging
import platform
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pal.train.distributed import HostReduce
from pal.train.master_weights import MasterWeights
from pal.train.objectives import LossOutput, MicroBatch
from pal.train.recipe import Stage

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """Results of a step, over all processes."""

    numbers_4: Tensor
    """On the device: summed loss, gradient norm before clipping, hits, tries."""
    items: int
    """Number of summands of the loss: trained tokens, answers or clips."""
    flags: list[bool]
    """For each flag, True if any process has set it."""


class Update:
    """Optimizer step of a stage: `update(micro_batches)` changes the weights once.

    A step with a NaN or infinite loss or gradient changes nothing: no weights, no optimizer state, no batch statistics.
    Beyond `max_nonfinite` such steps, later steps change nothing either, so when the fault is read on the host, the
    state is that before the last faulty step. The decision is made on the device. A step without items changes nothing.

    Args:
        objective: objective, prepared by the accelerator.
        optimizer: fused optimizer over the parameters of `masters`, or its part of this process, without gradients yet.
        masters: trained weights with their float32 master weights.
        stage: sets gradient clipping and precision.
        accelerator: `pal.train.engines.TrainingEngine`.
        host_reduce: sums host numbers over the processes.
        max_nonfinite: number of non-finite steps with which training goes on.
        nonfinite: number of those so far.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        masters: MasterWeights,
        stage: Stage,
        accelerator: Any,
        host_reduce: HostReduce,
        max_nonfinite: int = 0,
        nonfinite: int = 0,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.masters = masters
        self.stage = stage
        self.accelerator = accelerator
        self.host_reduce = host_reduce
        self.parameters = [p for part in masters.parts.values() for p in part.values()]
        self.statistics = [
            buffer
            for layer in objective.modules()
            if layer.training and getattr(layer, "track_running_stats", False)
            for buffer in layer.buffers(recurse=False)
        ]
        self.max_nonfinite = max_nonfinite
        self.nonfinite = torch.full((), float(nonfinite), device=accelerator.device)
        """Number of non-finite steps so far, on the device."""

    def __call__(self, micro_batches: list[MicroBatch], *flags: bool) -> StepResult:
        """Run one step; `flags` are combined over all processes."""
        accelerator, alone = self.accelerator, self.accelerator.num_processes == 1
        before = [buffer.clone() for buffer in self.statistics]
        sums = torch.zeros((), device=accelerator.device)
        hits: Tensor | int = 0
        tries: Tensor | int = 0
        items = 0
        for i, micro_batch in enumerate(micro_batches):
            with (
                autocast(accelerator.device, self.stage.precision),
                # DDP averages gradients over processes once, after the last micro-batch.
                accelerator.no_sync(self.objective) if i + 1 < len(micro_batches) else nullcontext(),
            ):
                outcome: LossOutput = self.objective(micro_batch)
                accelerator.backward(outcome.sum * micro_batch.counts)
            if alone or i + 1 == len(micro_batches):
                self.masters.take_gradients()
            sums = sums + outcome.sum.detach() * micro_batch.counts
            items += outcome.items * micro_batch.counts
            hits = hits + outcome.hits[0] * micro_batch.counts
            tries = tries + outcome.hits[1] * micro_batch.counts
        counted, *raised = self.host_reduce.sum(items, *flags)
        totals_3 = torch.stack([_number(x, sums.device) for x in (sums, hits, tries)])
        totals_3 = accelerator.reduce(totals_3, "sum")
        # DDP averages the gradients of the sums over processes: scale to the mean over all items
        scale = accelerator.num_processes / max(1.0, counted)
        max_norm = self.stage.clip_grad or float("inf")
        norm = accelerator.finish_gradients(self.parameters, scale, max_norm).to(sums.device)
        self._apply(totals_3[0], norm, before, counted > 0)
        numbers_4 = torch.stack((totals_3[0], norm.to(totals_3.dtype), totals_3[1], totals_3[2]))
        return StepResult(numbers_4, int(counted), [flag > 0 for flag in raised])

    @torch.no_grad()
    def _apply(self, loss: Tensor, norm: Tensor, before: list[Tensor], has_items: bool) -> None:
        """Update the weights, unless the step is non-finite or without items, or too many steps were non-finite."""
        fault = ~(loss.isfinite() & norm.isfinite())
        self.nonfinite += fault
        skip = fault | (self.nonfinite > self.max_nonfinite) if has_items else torch.ones_like(fault)
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(skip, old, buffer))
        # torch's fused optimizers skip the update where it is 1
        self.optimizer.found_inf = skip.to(self.nonfinite.dtype)  # type: ignore[attr-defined]
        self.accelerator.step(self.optimizer)
        self.masters.give_weights()


def _number(x: Tensor | float, device: torch.device) -> Tensor:
    """Scalar tensor on the device, float64 if supported; a host number is written by a fill kernel, without a copy."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return x.to(device, dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of matrix products to bfloat16; disabled for other precisions."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def emulates_bf16(device: torch.device) -> bool:
    """True on an x86 processor without AVX-512, where products in bfloat16 take tens of times as long as in float32."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device.type == "cpu" and x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def warn_of_emulation(device: torch.device, stage: str, index: int) -> None:
    """Log a warning where a stage in bfloat16 would be slow; `index` is that of the stage in its recipe."""
    if emulates_bf16(device):
        logger.warning(
            "stage '%s': this processor only emulates bfloat16, tens of times slower than float32; use --set "
            "stages.%d.precision=fp32, and another cache if the stage has one",
            stage,
            index,
        )
