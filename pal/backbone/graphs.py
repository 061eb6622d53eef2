"""Decoding steps as CUDA graphs, reused for later prompts of similar length."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pal.backbone.cache import JointCache

if TYPE_CHECKING:
    from pal.backbone.cache_storage import CachePlan
    from pal.backbone.decoding import DecodingOptions, DecodingState
    from pal.backbone.llm import Backbone

KEPT = 2
"""Number of buffer sets, with their graphs, that are kept per LLM; the least recently used is freed."""
WORTH = 8
"""Smallest number of remaining steps for which a graph is recorded."""


@dataclass
class Kept:
    """Buffers of a decoding loop, and the graph of a step that uses them."""

    state: DecodingState
    graph: Any = None
    logits_RV: Tensor | None = None
    """Output buffer of the graph."""
    made_of: Hashable = None
    """Identity of the weights and settings that the graph was recorded with."""


_kept: WeakKeyDictionary[Backbone, OrderedDict[Hashable, Kept]] = WeakKeyDictionary()


def possible(device: torch.device) -> bool:
    """True if the device supports CUDA graphs."""
    return device.type == "cuda"


def borrow(llm: Backbone, plan: CachePlan, options: DecodingOptions) -> Kept | None:
    """Take the buffers of an equal plan, with their graph; no other call gets them until they are given back."""
    return _kept.get(llm, OrderedDict()).pop(_key(llm, plan, options), None)


def give_back(
    llm: Backbone, plan: CachePlan, options: DecodingOptions, state: DecodingState, stepper: Stepper | None
) -> None:
    """Return buffers for reuse by another call."""
    assert isinstance(state.cache, JointCache)
    state.cache.end()
    state.logits_RV = None
    mine = _kept.setdefault(llm, OrderedDict())
    mine[_key(llm, plan, options)] = Kept(state) if stepper is None else stepper.kept
    while len(mine) > KEPT:
        mine.popitem(last=False)


def forget(llm: Backbone) -> None:
    """Free the buffers and graphs of an LLM."""
    _kept.pop(llm, None)


def _key(llm: Backbone, plan: CachePlan, options: DecodingOptions) -> Hashable:
    device = llm.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return plan, options.ends, options.pad, options.warpers, llm.device, llm.dtype, autocast


class Stepper:
    """Runs decoding steps, by a graph as soon as one is recorded."""

    def __init__(self, llm: Backbone, state: DecodingState, kept: Kept | None) -> None:
        self.llm, self.state = llm, state
        self.kept = kept or Kept(state)
        self.made_of = _made_of(llm, state)
        if self.kept.made_of != self.made_of:
            self.kept.graph = None
        self._warm = False

    def step(self, left: int) -> None:
        """Run one step; `left` steps remain, this one included."""
        # streams and graphs belong to the current device, which may differ from the LLM's
        with torch.cuda.device(self.llm.device) if self.llm.device.type == "cuda" else nullcontext():
            self._step(left)

    def _step(self, left: int) -> None:
        if self.kept.graph is not None:
            self.kept.graph.replay()
            self.state.logits_RV = self.kept.logits_RV
        elif self.made_of is None or left < WORTH:
            self.state.step(self.llm.lm)
        elif not self._warm:
            # on another stream, as torch requires: libraries initialise themselves outside of the graph
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.state.step(self.llm.lm)
            torch.cuda.current_stream().wait_stream(stream)
            self._warm = True
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.state.step(self.llm.lm)
            self.kept.graph, self.kept.made_of, self.kept.logits_RV = graph, self.made_of, self.state.logits_RV
            graph.replay()


def _made_of(llm: Backbone, state: DecodingState) -> Hashable | None:
    """Identity of a decoding step's graph; None where the step must run eagerly."""
    if (llm.lm.training and llm.dropout) or torch.is_autocast_enabled(llm.device.type):
        return None  # autocast's casts of weights are freed when its block ends
    assert isinstance(state.cache, JointCache)
    blocks = [block for blocks in state.cache.blocks for block in blocks.values()]
    parts = [llm.lm, *(block for block in blocks if isinstance(block, torch.nn.Module))]
    return made_of(modules_of(parts), llm.layers)


def modules_of(parts: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The parts with all modules inside them, each once; a fraction of the time of `Module.modules`."""
    found: dict[torch.nn.Module, None] = {}
    todo = list(parts)[::-1]
    while todo:
        module = todo.pop()
        if module not in found:
            found[module] = None
            todo += [child for child in module._modules.values() if child is not None]
    return list(found)


def made_of(modules: Iterable[torch.nn.Module], layers: Iterable[torch.nn.Module]) -> Hashable | None:
    """Modules, their settings and the addresses of their weights, which a CUDA graph fixes; None: no graph is possible.

    A graph runs no hooks, those of accelerate included, and would repeat one dropout mask for ever.

    Args:
        modules: all modules that the graph runs.
        layers: the LLM's layers; the hook that `Backbone` registers on each may be missing in a graph.
    """
    hooked = set(layers)
    found: list[Hashable] = []
    for module in modules:
        if module._forward_hooks or len(module._forward_pre_hooks) > (module in hooked) or "_hf_hook" in vars(module):
            return None
        if isinstance(module, torch.nn.Dropout) and module.training and module.p:
            return None
        about = ""
        if "scaling" in vars(module) and hasattr(module, "merged"):  # PEFT's layers
            about = repr((module.active_adapters, module.disable_adapters, module.merged, module.scaling))
        found.append((id(module), about))
        found += [
            None if x is None else x.data_ptr() for x in (*module._parameters.values(), *module._buffers.values())
        ]
    return tuple(found)
