"""CUDA graphs of an LLM's training step: forward and backward pass as two launches instead of thousands.

A GPU runs a layer's small kernels faster than the host can launch them. A CUDA graph launches all of them at once, but
fixes all sizes and addresses. So there is one pair of graphs for each batch size, recorded when the size occurs for the
second time; `pal.integrations.filling` rounds sizes up so that they recur. Each batch is copied into the graphs' input
buffers. Gradients of weights are written to buffers that all graphs share; these are the weights' `grad` until the next
backward pass.

Steps that a graph cannot repeat run eagerly: those with dropout, hooks or padded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pal.backbone import families
from pal.backbone.graphs import modules_of
from pal.backbone.loss import plain_head
from pal.backbone.packed import PackedContext, PackedSource
from pal.backbone.recording import BatchTensors, Recorder, Recordings, laid_out, same_autocast, setting_of
from pal.backbone.tied import has_gradient_hooks, shared_weight
from pal.types import LLMInputs, Targets

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

KEPT = 32
"""Number of batch sizes whose graphs are kept; the least recently used are freed."""


class LossGraphs:
    """Cross-entropy sums with their gradients, computed by CUDA graphs where possible.

    Args:
        recorder: by default, CUDA graphs on the LLM's device.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recordings: Recordings[_Pass] = Recordings(recorder, KEPT)
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._running: ref[_Ticket] | None = None

    @property
    def failed(self) -> str | None:
        """Reason why no more graphs are recorded; None while they are."""
        return self._recordings.failed

    def possible(self, device: torch.device) -> bool:
        """True if steps on this device may become graphs."""
        return self._recordings.possible(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> LossGraphs:
        return LossGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return LossGraphs, ()

    def __len__(self) -> int:
        return len(self._recordings)

    def total(
        self, llm: Backbone, inputs: LLMInputs, targets: Targets, weights_N: Tensor | None, losses: Losses
    ) -> Tensor | None:
        """Weighted sum of the losses, whose backward pass is a graph, too; None where the step must run eagerly.

        Args:
            llm: the LLM.
            inputs: packed conversations.
            targets: tokens to predict.
            weights_N: weight of each token's loss; None means 1.
            losses: computes each token's loss.
        """
        if not self.possible(llm.device) or not isinstance(inputs.audio_context, PackedContext):
            return None
        if self._running is not None and self._running() is not None:
            return None  # an earlier loss still needs its backward pass, whose activations are in the graphs' memory
        if not all(isinstance(keys.source, PackedSource) for keys in inputs.audio_context.keys):
            return None  # its keys would be computed twice: to find the graphs' inputs, and to use them
        parts = BatchTensors()
        on_device = replace(targets, lengths=(), conversations=0)
        given = parts.of((laid_out(inputs, inputs.audio_context), on_device, weights_N))
        modules = modules_of([llm.lm, *parts.modules])
        trained = parts.trained(modules)
        setting = self._setting_of(llm, modules, trained)
        if setting is None or not (trained or any(x.requires_grad for x in parts.tensors)):
            return None

        def record(recorder: Recorder) -> _Pass:
            return _Pass(llm, parts, trained, given, losses, self._gradients, recorder)

        made = self._recordings.find(llm, setting, parts.key(), record)
        if made is None:
            return None
        ticket = _Ticket()
        self._running = ref(ticket)
        total: Tensor = _Replay.apply(ticket, made, made.anchor, *parts.tensors)
        return total

    def _setting_of(
        self, llm: Backbone, modules: Sequence[nn.Module], trained: Sequence[nn.Parameter]
    ) -> Hashable | None:
        """All that graphs depend on besides sizes; None where no graph is possible."""
        lm = llm.lm
        if families.checkpoints(lm) or any(map(has_gradient_hooks, trained)):
            return None  # checkpointing saves the state of random numbers, which a graph cannot read
        if any(one is shared_weight(lm) for one in trained) and not plain_head(lm.lm_head):
            return None  # see `_Pass.head`
        setting = setting_of(llm, modules)
        return setting and (setting, tuple(map(id, trained)))


Losses = Callable[["Backbone", LLMInputs, Targets, Tensor | None], Tensor]
"""Computes the loss of each labelled token, [N], with another tensor in place of the head's weight if one is given."""


class _Ticket:
    """Token that lives as long as a loss whose backward pass may still be called."""


class _Pass:
    """Recorded forward and backward pass for one batch size."""

    def __init__(
        self,
        llm: Backbone,
        parts: BatchTensors,
        trained: list[nn.Parameter],
        given: Any,
        losses: Losses,
        gradients: dict[nn.Parameter, Tensor],
        recorder: Recorder,
    ) -> None:
        self._llm, self._losses = llm, losses
        self.inputs = [torch.empty_like(x).copy_(x.detach()).requires_grad_(x.requires_grad) for x in parts.tensors]
        self._given = parts.rebuilt(given, self.inputs)
        self.weights = trained
        self.anchor = self.weights[-1] if self.weights else None
        # The batch's embeddings, made outside of the graph, hold autograd's node for the gradient of their weight, and
        # that node is tied to the stream it was made on. Gradients of a head with the same weight would go to it, and
        # so pull that stream into the recording, which CUDA refuses. So the head uses a leaf with the same memory.
        shared = shared_weight(llm.lm)
        trains_head = any(weight is shared for weight in self.weights)
        self.head = shared.detach().requires_grad_() if shared is not None and trains_head else None
        self._total: Tensor | None = None
        self.gradient = torch.ones((), device=llm.device)
        self.buffers: list[tuple[nn.Parameter, Tensor]] = []
        self._shared = gradients
        recorder.warm_up(self._both)
        for weight in self.weights:
            if weight not in gradients:
                gradients[weight] = torch.empty_like(weight)
        self.forward, (self.total,) = recorder.record(self._forward)
        self.backward, self.loose = recorder.record(self._backward)
        self._total = None

    @property
    def output_bytes(self) -> int:
        """Gradients of the inputs."""
        return sum(x.nbytes for x in self.loose if x is not None)

    def _both(self) -> None:
        self._forward()
        found = self._gradients_of_all()
        used = found[len(found) - len(self.weights) :]
        self.weights = [weight for weight, grad in zip(self.weights, used, strict=True) if grad is not None]
        self._total = None

    def _forward(self) -> list[Tensor | None]:
        inputs, targets, weights_N = self._given
        with torch.enable_grad(), same_autocast(self._llm.device.type):
            losses_N = self._losses(self._llm, inputs, targets, self.head)
            self._total = (losses_N if weights_N is None else losses_N * weights_N).sum()
        return [self._total.detach()]

    def _gradients_of_all(self) -> list[Tensor | None]:
        assert self._total is not None
        wanted = [x for x in self.inputs if x.requires_grad]
        leaves: list[Tensor] = list(self.weights)
        if self.head is not None:
            shared = shared_weight(self._llm.lm)
            leaves = [self.head if weight is shared else weight for weight in self.weights]
        gradient = self.gradient.to(self._total.dtype)
        return list(torch.autograd.grad(self._total, [*wanted, *leaves], gradient, allow_unused=True))

    def _backward(self) -> list[Tensor | None]:
        found = self._gradients_of_all()
        loose = len(found) - len(self.weights)
        made = [grad for grad in found[loose:] if grad is not None]
        buffers = [self._shared[weight] for weight in self.weights]
        if made:
            torch._foreach_copy_(buffers, made)
        self.buffers = list(zip(self.weights, buffers, strict=True))
        return found[:loose]

    @torch.no_grad()
    def put(self, tensors: Sequence[Tensor]) -> None:
        """Copy another batch of this size into the input buffers."""
        torch._foreach_copy_([x.detach() for x in self.inputs], list(tensors))

    @torch.no_grad()
    def run_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs; those of weights become, or are added to, the weights' `grad`."""
        for weight, buffer in self.buffers:
            if weight.grad is buffer:  # from an earlier micro-batch of this step
                weight.grad = buffer.clone()
        self.gradient.copy_(gradient)
        self.backward()
        more = [(weight.grad, buffer) for weight, buffer in self.buffers if weight.grad is not None]
        for weight, buffer in self.buffers:
            if weight.grad is None:
                weight.grad = buffer
        if more:
            held, added = zip(*more, strict=True)
            torch._foreach_add_(list(held), list(added))
        # copies, since the caller may keep them and the next backward pass overwrites the buffers
        return [None if grad is None else grad.clone() for grad in self.loose]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: _Ticket, made: _Pass, anchor: Tensor | None, *tensors: Tensor) -> Tensor:
        made.put(tensors)
        made.forward()
        ctx.ticket, ctx.made = ticket, made
        ctx.wanted = [x.requires_grad for x in tensors]
        assert made.total is not None
        return made.total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = iter(ctx.made.run_backward(gradient))
        ctx.ticket = None
        return None, None, None, *(next(found) if wanted else None for wanted in ctx.wanted)
