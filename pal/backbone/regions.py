"""Compile an LLM layer by layer: in seconds instead of minutes, one graph for all layers of a kind and all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from pal.backbone.packed import PackedLayer

GRAPHS = 64
"""Maximum number of graphs of a layer's code: with and without gradients, with and without audio keys, and so on."""


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Compile the `forward` of each layer in place. Hooks on the layers run outside of the compiled code.

    Hooks on torch's own modules inside a layer run only if they were registered before; for later ones, call
    `uncompile_layers` first.

    Args:
        layers: decoder layers of transformers.
        options: for torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    chosen: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": {"guard_filter_fn": _needed}, **options}
    for layer in layers:
        if "forward" not in vars(layer) or is_compiled(layer):  # else it is accelerate's, say, which runs hooks
            layer.forward = CompiledLayer(layer, chosen)


def uncompile_layers(layers: Iterable[nn.Module]) -> None:
    """Restore the `forward` of the layers' class."""
    for layer in layers:
        if is_compiled(layer):
            del layer.forward


def is_compiled(layer: nn.Module) -> bool:
    """True if `compile_layers` compiled the layer."""
    return isinstance(vars(layer).get("forward"), CompiledLayer)


class CompiledLayer:
    """A layer's `forward`: compiled without audio and with packed rows, eager with padded rows and audio.

    With padded rows, attention depends on the layer's number, of which one graph for all layers knows only the first.
    `PackedLayer` has what this layer needs. A copy of the layer gets its own.
    """

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        self._layer, self._options = layer, options
        self._plain: Callable[..., Any] = type(layer).forward.__get__(layer)
        self._compiled = torch.compile(self._plain, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        metadata = kwargs.get("attention_metadata")
        # a batch has tiles of its own, which no graph of another batch has
        packed = metadata is None or (isinstance(metadata, PackedLayer) and metadata.tiles is None)
        return (self._compiled if packed else self._plain)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledLayer:
        return CompiledLayer(deepcopy(self._layer, memo), self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledLayer, (self._layer, self._options)


def _needed(guards: Sequence[Any]) -> list[bool]:
    """True for guards of a graph that are checked at each call.

    Most guards are on the state of torch's own modules, such as that a linear layer has no hooks. Checking them takes
    the host longer than a layer's kernels take the GPU, so they are skipped. Still checked is all that training can
    change: the weights, their dtype and whether they need gradients, and the layers' own state, such as their mode.
    """
    return [
        guard.guard_type == "TENSOR_MATCH" or not guard.orig_guard.source.is_unspecialized_builtin_nn_module()
        for guard in guards
    ]
