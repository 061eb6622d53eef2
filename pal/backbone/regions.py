"""Compiling an LLM layer by layer: seconds instead of minutes, one graph for all layers of a kind and all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from pal.backbone.packed import PackedLayer

GRAPHS = 64
"""Graphs that a layer's code may have: in training and without gradients, with audio keys and without, and so on."""


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Compile the `forward` of each layer in place. Hooks on the layers stay outside, and may know a layer's number.

    Hooks on torch's own modules inside a layer are heard only where they were there before; take them off or
    uncompile.

    Args:
        layers: decoder layers of transformers.
        options: for torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    chosen: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": {"guard_filter_fn": _needed}, **options}
    for layer in layers:
        if "forward" not in vars(layer) or is_compiled(layer):  # another's, such as accelerate's, which has hooks in it
            layer.forward = CompiledLayer(layer, chosen)


def uncompile_layers(layers: Iterable[nn.Module]) -> None:
    """Give the layers the `forward` of their class again."""
    for layer in layers:
        if is_compiled(layer):
            del layer.forward


def is_compiled(layer: nn.Module) -> bool:
    """Whether `compile_layers` compiled a layer."""
    return isinstance(vars(layer).get("forward"), CompiledLayer)


class CompiledLayer:
    """A layer's `forward`, compiled where no audio is heard, or that of packed rows, which says what this layer hears.

    In padded batches that depends on the layer's number, and one graph for all layers knows only that of the first.
    A copy of the layer gets one of its own.
    """

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        self._layer, self._options = layer, options
        self._plain: Callable[..., Any] = type(layer).forward.__get__(layer)
        self._compiled = torch.compile(self._plain, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        metadata = kwargs.get("attention_metadata")
        packed = metadata is None or isinstance(metadata, PackedLayer)
        return (self._compiled if packed else self._plain)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledLayer:
        return CompiledLayer(deepcopy(self._layer, memo), self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledLayer, (self._layer, self._options)


def _needed(guards: Sequence[Any]) -> list[bool]:
    """Which of a graph's guards are checked at each call.

    Those on the insides of torch's own modules, such as that a linear layer has no hooks, are most of them, and
    checking them takes a GPU's host longer than a layer's kernels. What can change while training is still checked:
    which weights there are, their type and whether they need gradients, and everything about the layers themselves,
    such as whether they train.
    """
    return [
        guard.guard_type == "TENSOR_MATCH" or not guard.orig_guard.source.is_unspecialized_builtin_nn_module()
        for guard in guards
    ]
