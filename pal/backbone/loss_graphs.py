"""CUDA graphs of an LLM's training step: forward and backward pass as two launches instead of thousands.

A GPU runs a layer's small kernels faster than the host can launch them. A CUDA graph launches all of them at once, but
fixes all sizes and addresses. So there is one pair of graphs for each batch size, recorded when the size occurs for the
second time; `pal.integrations.filling` rounds sizes up so that they recur. Each batch is copied into the graphs' input
buffers. Gradients of weights are written to buffers that all graphs share; these are the weights' `grad` until the next
backward pass.

Steps that a graph cannot repeat run eagerly: those with dropout, hooks or padded rows.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pal.backbone import families
from pal.backbone.graphs import made_of, modules_of
from pal.backbone.loss import plain_head
from pal.backbone.packed import PackedContext, PackedSource, Projection
from pal.backbone.tied import has_gradient_hooks, shared_weight
from pal.types import LLMInputs, Targets

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

logger = logging.getLogger(__name__)

KEPT = 32
"""Number of batch sizes whose graphs are kept; the least recently used are freed."""
SEEN = 1024
"""Number of batch sizes remembered as seen once."""


SETTINGS = 8
"""Number of settings (a model with its trained weights and modes) whose graphs are kept."""

_Key = tuple[int, Hashable]
"""Number of the setting, and the batch's sizes."""


class Recorder(Protocol):
    """Interface of a recorder: makes a function repeatable, with inputs and results at fixed addresses."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run the function once, as it will be recorded."""
        ...

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """A function that replays the recorded one, and its output tensors, undefined until the first replay."""
        ...


class CudaRecorder:
    """Recorder of CUDA graphs, which share one memory pool, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run on the stream that will record, since libraries initialise themselves per stream."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """Record one graph; its results are in the graph's memory."""
        graph = torch.cuda.CUDAGraph()
        # other threads may load and move batches meanwhile
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            results = run()
        return graph.replay, results


class LossGraphs:
    """Cross-entropy sums with their gradients, computed by CUDA graphs where possible.

    Args:
        recorder: by default, CUDA graphs on the LLM's device.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self._settings: OrderedDict[Hashable, int] = OrderedDict()
        self._numbers = 0
        self._kept: OrderedDict[_Key, _Pass] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._running: ref[_Ticket] | None = None
        self.failed: str | None = None
        """Reason why no more graphs are recorded; None while they are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LossGraphs:
        return LossGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return LossGraphs, ()

    def __len__(self) -> int:
        return len(self._kept)

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
        if self.failed is not None or not isinstance(inputs.audio_context, PackedContext):
            return None
        if self._running is not None and self._running() is not None:
            return None  # an earlier loss still needs its backward pass, whose activations are in the graphs' memory
        if not all(isinstance(keys.source, PackedSource) for keys in inputs.audio_context.keys):
            return None  # its keys would be computed twice: to find the graphs' inputs, and to use them
        parts = _Parts()
        on_device = replace(targets, lengths=(), conversations=0)
        given = parts.of((_laid_out(inputs, inputs.audio_context), on_device, weights_N))
        modules = modules_of([llm.lm, *parts.modules])
        trained = parts.trained(modules)
        setting = self._setting_of(llm, modules, trained)
        if setting is None or not (trained or any(x.requires_grad for x in parts.tensors)):
            return None
        made = self._pass(llm, parts, trained, given, losses, (self._number(setting), parts.key()))
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
        device, lm = llm.device.type, llm.lm
        if families.checkpoints(lm) or any(map(has_gradient_hooks, trained)):
            return None  # checkpointing saves the state of random numbers, which a graph cannot read
        if any(one is shared_weight(lm) for one in trained) and not plain_head(lm.lm_head):
            return None  # see `_Pass.head`
        made = made_of(modules, llm.layers)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return made and (made, tuple(map(id, trained)), autocast, lm.training, llm.recomputes_audio)

    def _number(self, setting: Hashable) -> int:
        """Number of a setting; where there are too many, the least recently used is dropped with its graphs."""
        if setting not in self._settings:
            self._settings[setting] = self._numbers = self._numbers + 1
            if len(self._settings) > SETTINGS:
                _, gone = self._settings.popitem(last=False)
                for known in (self._kept, self._seen):
                    for key in [key for key in known if key[0] == gone]:
                        del known[key]
        self._settings.move_to_end(setting)
        return self._settings[setting]

    def _pass(
        self,
        llm: Backbone,
        parts: _Parts,
        trained: list[nn.Parameter],
        given: Any,
        losses: Losses,
        key: _Key,
    ) -> _Pass | None:
        """Graphs for batches of this size; None when the size occurs for the first time."""
        made = self._kept.get(key)
        if made is None:
            if key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > SEEN:
                    self._seen.popitem(last=False)
                return None
            made = self._make(llm, parts, trained, given, losses)
            if made is None:
                return None
            self._kept[key] = made
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return made

    def _make(
        self, llm: Backbone, parts: _Parts, trained: list[nn.Parameter], given: Any, losses: Losses
    ) -> _Pass | None:
        logger.debug("a CUDA graph for another size of batch: %d rows", given[0].inputs_embeds_BTD.shape[:2].numel())
        if self._recorder is None:
            self._recorder = CudaRecorder(llm.device)
        try:
            return _Pass(llm, parts, trained, given, losses, self._gradients, self._recorder)
        except RuntimeError as error:  # torch's base class for errors of CUDA, memory and graph capture
            self.failed = str(error).splitlines()[0]
            self._kept.clear()
            logger.warning("training goes on without CUDA graphs: %s", self.failed)
            return None


Losses = Callable[["Backbone", LLMInputs, Targets, Tensor | None], Tensor]
"""Computes the loss of each labelled token, [N], with another tensor in place of the head's weight if one is given."""


class _Ticket:
    """Token that lives as long as a loss whose backward pass may still be called."""


class _Pass:
    """Recorded forward and backward pass for one batch size."""

    def __init__(
        self,
        llm: Backbone,
        parts: _Parts,
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

    def _both(self) -> None:
        self._forward()
        found = self._gradients_of_all()
        used = found[len(found) - len(self.weights) :]
        self.weights = [weight for weight, grad in zip(self.weights, used, strict=True) if grad is not None]
        self._total = None

    def _forward(self) -> list[Tensor | None]:
        inputs, targets, weights_N = self._given
        device = self._llm.device.type
        # weights' casts in autocast's cache would be those of the recorded step
        autocast = torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        with torch.enable_grad(), autocast:
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


# Tensors of a batch


class _Made:
    """`PackedSource` with each layer's K/V, or projection, computed already."""

    def __init__(self, made: Mapping[int, Projection | tuple[Tensor, Tensor]]) -> None:
        self.made = made

    def ready(self, more: int | None) -> None:
        """Nothing to do."""

    def projection(self, layer: int) -> Any:
        """Projection of a layer."""
        return self.made[layer]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Not used with packed rows."""
        raise NotImplementedError


def _laid_out(inputs: LLMInputs, packed: PackedContext) -> LLMInputs:
    """The inputs without host-only fields, and with each layer's projection or K/V in place of their source."""
    keys = tuple(replace(one, source=_Made({layer: one.made(layer) for layer in one.layers})) for one in packed.keys)
    context = replace(packed, lengths=(), conversations=(), keys=keys)
    return replace(inputs, audio_context=context, labels_BT=None, targets=None)


class _Parts:
    """Tensors of nested dataclasses, tuples and mappings, each once, and the modules among them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self._numbers: dict[int, int] = {}
        self._rest: list[Hashable] = []

    def of(self, x: Any) -> Any:
        """Collect the tensors of `x`; returns `x`."""
        if isinstance(x, nn.Parameter):
            self.parameters.append(x)
            self._rest.append(id(x))
        elif isinstance(x, Tensor):
            if id(x) not in self._numbers:
                self._numbers[id(x)] = len(self.tensors)
                self.tensors.append(x)
            self._rest.append(("tensor", self._numbers[id(x)]))
        elif isinstance(x, nn.Module):
            self.modules.append(x)
            self._rest.append(id(x))
        else:
            children = _children(x)
            if children is None:
                self._rest.append(x if isinstance(x, Hashable) else id(x))
            else:
                self._rest.append((type(x).__name__, len(children)))
                for name, child in children:
                    self._rest.append(name)
                    self.of(child)
        return x

    def key(self) -> Hashable:
        """Hashable key, equal for batches that differ only in the values of their tensors."""
        return tuple(self._rest), tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in self.tensors)

    def trained(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Parameters of the modules, and those among the inputs, that may get gradients, each once."""
        found = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        return list(dict.fromkeys(weight for weight in (*found, *self.parameters) if weight.requires_grad))

    def rebuilt(self, x: Any, tensors: Sequence[Tensor]) -> Any:
        """`x` with its tensors replaced."""
        if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
            return tensors[self._numbers[id(x)]]
        children = None if isinstance(x, nn.Module | Tensor) else _children(x)
        if children is None:
            return x
        new = {name: self.rebuilt(child, tensors) for name, child in children}
        if isinstance(x, _Made):
            return _Made(new)
        if is_dataclass(x) and not isinstance(x, type):
            return replace(x, **new)
        if isinstance(x, tuple):
            return tuple(new.values())
        return new


def _children(x: Any) -> list[tuple[Any, Any]] | None:
    """Fields or items of `x` by name; None for a leaf."""
    if isinstance(x, _Made):
        return list(x.made.items())
    if is_dataclass(x) and not isinstance(x, type):
        return [(field.name, getattr(x, field.name)) for field in fields(x)]
    if isinstance(x, tuple):
        return list(enumerate(x))
    if isinstance(x, Mapping):
        return list(x.items())
    return None
