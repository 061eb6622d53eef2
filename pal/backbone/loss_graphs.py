"""CUDA graphs of an LLM's training step: forward and backward pass as two launches instead of thousands.

A layer's small kernels take a GPU less time than a host needs to launch them. A CUDA graph launches all at once, but
fixes every size and every address. So there is one pair of graphs for each size of batch, made when that size comes for
the second time (`pal.integrations.filling` sees to it that sizes come back), and what changes from batch to batch is
copied to where the graphs read it. Gradients of weights are left in buffers that all graphs share, and which are the
weights' `grad` until the next backward pass.

What a graph cannot repeat runs as it is written: dropout, hooks, rows that are padded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pal.backbone import families
from pal.backbone.graphs import made_of
from pal.backbone.packed import PackedContext, PackedSource, Projection
from pal.types import LLMInputs, Targets

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

logger = logging.getLogger(__name__)

KEPT = 32
"""Sizes of batches whose graphs are kept: those used last."""
SEEN = 1024
"""Sizes that are remembered as having come once."""


SETTINGS = 8
"""Models and ways to train them whose graphs are kept."""

_Key = tuple[int, Hashable]
"""Number of the setting, and the sizes."""


class Recorder(Protocol):
    """What makes something repeatable, results and all, at the same addresses."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it once as it will be recorded."""
        ...

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """What runs it again, and where it then leaves its results; they hold nothing before it has."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share their memory since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """On the stream on which it will be recorded, since libraries set themselves up for each."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """One graph; its results are in the graph's memory."""
        graph = torch.cuda.CUDAGraph()
        # other threads may go on loading and moving batches
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            results = run()
        return graph.replay, results


class LossGraphs:
    """Sums of cross-entropies with their gradients, by graphs where they can be had.

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
        """Why no graph is made any more."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LossGraphs:
        return LossGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return LossGraphs, ()

    def __len__(self) -> int:
        return len(self._kept)

    def total(
        self, llm: Backbone, inputs: LLMInputs, targets: Targets, weights_N: Tensor | None, losses: Losses
    ) -> Tensor | None:
        """The weighted sum of the losses, whose backward pass also is a graph; None where it is to be run as written.

        Args:
            llm: the LLM.
            inputs: packed conversations.
            targets: which tokens they have to predict.
            weights_N: of each token's loss; None for 1.
            losses: what makes each token's loss of these.
        """
        if self.failed is not None or not isinstance(inputs.audio_context, PackedContext):
            return None
        if self._running is not None and self._running() is not None:
            return None  # a loss whose backward pass is still to come: its activations are in the graphs' memory
        if not all(isinstance(keys.source, PackedSource) for keys in inputs.audio_context.keys):
            return None  # its keys would be made twice: to see what they are, and to use them
        parts = _Parts()
        on_device = replace(targets, lengths=(), conversations=0)
        given = parts.of((_laid_out(inputs, inputs.audio_context), on_device, weights_N))
        trained = parts.trained(llm)
        setting = self._setting_of(llm, parts, trained)
        if setting is None or not (trained or any(x.requires_grad for x in parts.tensors)):
            return None
        made = self._pass(llm, parts, given, losses, (self._number(setting), parts.key()))
        if made is None:
            return None
        ticket = _Ticket()
        self._running = ref(ticket)
        total: Tensor = _Replay.apply(ticket, made, made.anchor, *parts.tensors)
        return total

    def _setting_of(self, llm: Backbone, parts: _Parts, trained: Sequence[nn.Parameter]) -> Hashable | None:
        """All that graphs depend on besides sizes; None where there can be none."""
        device, lm = llm.device.type, llm.lm
        if families.checkpoints(lm) or any(one._post_accumulate_grad_hooks for one in trained):
            return None  # checkpointing keeps the state of random numbers, which a graph cannot ask for
        modules = made_of([lm, *parts.modules], llm.layers)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return modules and (modules, tuple(map(id, trained)), autocast, lm.training, llm.recomputes_audio)

    def _number(self, setting: Hashable) -> int:
        """Of a setting; that which was used least recently is forgotten with its graphs where there are too many."""
        if setting not in self._settings:
            self._settings[setting] = self._numbers = self._numbers + 1
            if len(self._settings) > SETTINGS:
                _, gone = self._settings.popitem(last=False)
                for known in (self._kept, self._seen):
                    for key in [key for key in known if key[0] == gone]:
                        del known[key]
        self._settings.move_to_end(setting)
        return self._settings[setting]

    def _pass(self, llm: Backbone, parts: _Parts, given: Any, losses: Losses, key: _Key) -> _Pass | None:
        """The graphs for batches of this size; None when it comes for the first time."""
        made = self._kept.get(key)
        if made is None:
            if key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > SEEN:
                    self._seen.popitem(last=False)
                return None
            made = self._make(llm, parts, given, losses)
            if made is None:
                return None
            self._kept[key] = made
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return made

    def _make(self, llm: Backbone, parts: _Parts, given: Any, losses: Losses) -> _Pass | None:
        logger.debug("a CUDA graph for another size of batch: %d rows", given[0].inputs_embeds_BTD.shape[:2].numel())
        if self._recorder is None:
            self._recorder = CudaRecorder(llm.device)
        try:
            return _Pass(llm, parts, given, losses, self._gradients, self._recorder)
        except RuntimeError as error:  # torch's errors of CUDA, of memory and of capturing are such
            self.failed = str(error).splitlines()[0]
            self._kept.clear()
            logger.warning("training goes on without CUDA graphs: %s", self.failed)
            return None


Losses = Callable[["Backbone", LLMInputs, Targets], Tensor]
"""The loss of each labelled token, [N]."""


class _Ticket:
    """Lives as long as a loss may still be asked for its gradients."""


class _Pass:
    """Forward and backward pass of one size of batch."""

    def __init__(
        self,
        llm: Backbone,
        parts: _Parts,
        given: Any,
        losses: Losses,
        gradients: dict[nn.Parameter, Tensor],
        recorder: Recorder,
    ) -> None:
        self._llm, self._losses = llm, losses
        self.inputs = [torch.empty_like(x).copy_(x.detach()).requires_grad_(x.requires_grad) for x in parts.tensors]
        self._given = parts.rebuilt(given, self.inputs)
        self.weights = parts.trained(llm)
        self.anchor = self.weights[-1] if self.weights else None
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
        # casts of weights that autocast keeps would be those of the step that is recorded
        autocast = torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        with torch.enable_grad(), autocast:
            losses_N = self._losses(self._llm, inputs, targets)
            self._total = (losses_N if weights_N is None else losses_N * weights_N).sum()
        return [self._total.detach()]

    def _gradients_of_all(self) -> list[Tensor | None]:
        assert self._total is not None
        wanted = [x for x in self.inputs if x.requires_grad]
        gradient = self.gradient.to(self._total.dtype)
        return list(torch.autograd.grad(self._total, [*wanted, *self.weights], gradient, allow_unused=True))

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
        """Another batch of this size."""
        torch._foreach_copy_([x.detach() for x in self.inputs], list(tensors))

    @torch.no_grad()
    def run_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs; those of weights go to where an optimizer finds them."""
        for weight, buffer in self.buffers:
            if weight.grad is buffer:  # of a part of the step before this one
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
        # who gets these may keep them, and the next backward pass writes over them
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


# What a batch is made of


class _Made:
    """A source of audio keys whose K/V, or what layers make them of, are there."""

    def __init__(self, made: Mapping[int, Projection | tuple[Tensor, Tensor]]) -> None:
        self.made = made

    def ready(self, more: int | None) -> None:
        """They are."""

    def projection(self, layer: int) -> Any:
        """What a layer makes K/V of, or has of them."""
        return self.made[layer]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Packed rows ask for none."""
        raise NotImplementedError


def _laid_out(inputs: LLMInputs, packed: PackedContext) -> LLMInputs:
    """The same without what only the host needs, and with audio keys whose makers say of what they make them."""
    keys = tuple(replace(one, source=_Made({layer: one.made(layer) for layer in one.layers})) for one in packed.keys)
    context = replace(packed, lengths=(), conversations=(), keys=keys)
    return replace(inputs, audio_context=context, labels_BT=None, targets=None)


class _Parts:
    """The tensors of nested dataclasses, tuples and mappings, each once, and the modules among them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self._numbers: dict[int, int] = {}
        self._rest: list[Hashable] = []

    def of(self, x: Any) -> Any:
        """Take all of `x`, and give it back."""
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
        """Equal for what differs only in the numbers that tensors hold."""
        return tuple(self._rest), tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in self.tensors)

    def trained(self, llm: Backbone) -> list[nn.Parameter]:
        """Weights that may get gradients, each once."""
        modules: list[nn.Module] = [llm.lm, *self.modules]
        found = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        found += [weight for weight in self.parameters if weight.requires_grad]
        return list(dict.fromkeys(found))

    def rebuilt(self, x: Any, tensors: Sequence[Tensor]) -> Any:
        """`x` with other tensors in the place of its own."""
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
    """What `x` consists of, by name; None for what is one thing."""
    if isinstance(x, _Made):
        return list(x.made.items())
    if is_dataclass(x) and not isinstance(x, type):
        return [(field.name, getattr(x, field.name)) for field in fields(x)]
    if isinstance(x, tuple):
        return list(enumerate(x))
    if isinstance(x, Mapping):
        return list(x.items())
    return None
