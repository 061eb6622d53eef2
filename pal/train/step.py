"""One update of the weights after the other, without waiting for the device that computes them.

What a step finds out (its loss, its gradient's norm, what was right) stays on the device until `meter` reads it; only
numbers that the host knows anyway, such as how many tokens were trained, decide how a step goes. So the host can hand
over a step while the device is still busy with the one before.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pal.train.distributed import HostReduce
from pal.train.master_weights import MasterWeights
from pal.train.objectives import LossOutput, MicroBatch
from pal.train.recipe import Stage


class StepResult(NamedTuple):
    """What a step leaves behind, over all processes."""

    numbers_4: Tensor
    """On the device: the sum of the losses, the gradient's norm before it was clipped, hits, tries."""
    items: int
    """Trained tokens, or clips, that the sum is over."""
    flags: list[bool]
    """Whether any process raised each of its flags."""


class Update:
    """The step of a stage: `update(works)` changes the weights once.

    A step whose loss or gradient is not finite changes nothing: neither weights nor the optimizer's state nor the
    batch statistics of what trains. Nor does any step after it, so that what is there when the fault is read is what
    was there before it. All this is decided on the device.

    Args:
        objective: as the accelerator prepared it.
        optimizer: over the parameters of `masters`, fused, with gradients of zero or none.
        masters: what is trained, float32 copies included.
        stage: says how gradients are clipped, and the precision.
        accelerator: `accelerate.Accelerator`, or what has its methods.
        host_reduce: sums over the processes.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        masters: MasterWeights,
        stage: Stage,
        accelerator: Any,
        host_reduce: HostReduce,
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
        self.failed = torch.zeros((), device=accelerator.device)
        """1 once a step was not finite: what torch's fused optimizers take as `found_inf`, and then leave all as it is.
        """

    def __call__(self, micro_batches: list[MicroBatch], *flags: bool) -> StepResult:
        """One step; `flags` are told to all processes."""
        accelerator, alone = self.accelerator, self.accelerator.num_processes == 1
        before = [buffer.clone() for buffer in self.statistics]
        sums = torch.zeros((), device=accelerator.device)
        hits: Tensor | int = 0
        tries: Tensor | int = 0
        items = 0
        for i, micro_batch in enumerate(micro_batches):
            with (
                autocast(accelerator.device, self.stage.precision),
                # Gradients of several processes are averaged once, after the last part.
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
        told_3 = torch.stack([_number(x, sums.device) for x in (sums, hits, tries)])
        told_3 = accelerator.reduce(told_3, reduction="sum")
        # Each process has the gradient of its sum, and DDP took the mean: make it that of the mean over all tokens.
        scale = accelerator.num_processes / max(1.0, counted)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for dtype in {gradient.dtype for gradient in gradients}:  # of one type they take one kernel
            torch._foreach_mul_([gradient for gradient in gradients if gradient.dtype == dtype], scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.stage.clip_grad or float("inf")).to(sums.device)
        self._apply(told_3[0], norm, before)
        numbers_4 = torch.stack((told_3[0], norm.to(told_3.dtype), told_3[1], told_3[2]))
        return StepResult(numbers_4, int(counted), [flag > 0 for flag in raised])

    @torch.no_grad()
    def _apply(self, loss: Tensor, norm: Tensor, before: list[Tensor]) -> None:
        """Change the weights, unless this step or one before it was not finite."""
        finite = loss.isfinite() & norm.isfinite()
        self.failed = torch.maximum(self.failed, (~finite).to(self.failed.dtype))
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(self.failed > 0, old, buffer))
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.give_weights()


def _number(x: Tensor | float, device: torch.device) -> Tensor:
    """In float64 where the device has it; numbers of the host get there with the kernel that fills them in."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return x.to(device, dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bfloat16, or as the numbers are stored."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
