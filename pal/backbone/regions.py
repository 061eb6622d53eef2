"""Compiling an LLM layer by layer: seconds instead of minutes, and one graph for all layers of a kind and all lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

GRAPHS = 64
"""Graphs that a layer's code may have: in training and without gradients, with audio keys and without, and so on."""


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Compile the `forward` of each layer in place. Hooks on the layers stay outside, and may know a layer's number.

    Args:
        layers: decoder layers of transformers.
        options: for torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    chosen: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": {"guard_filter_fn": _needed}, **options}
    for layer in layers:
        layer.forward = torch.compile(type(layer).forward.__get__(layer), **chosen)


def uncompile_layers(layers: Iterable[nn.Module]) -> None:
    """Give the layers the `forward` of their class again."""
    for layer in layers:
        vars(layer).pop("forward", None)


def _needed(guards: Sequence[Any]) -> list[bool]:
    """Which of a graph's guards are checked at each call.

    Those on the insides of torch's own modules, such as that a linear layer has no hooks, are most of them, and
    checking them takes a GPU's host longer than a layer's kernels. What can change while training is still checked:
    which weights there are, their type and whether they need gradients, and everything about the layers themselves.
    """
    return [
        guard.guard_type == "TENSOR_MATCH" or not guard.orig_guard.source.is_unspecialized_builtin_nn_module()
        for guard in guards
    ]
