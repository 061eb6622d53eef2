"""Layers of transformers' models compiled one by one, as `Backbone.compile` does it with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from torch import nn


@contextmanager
def many_graphs() -> Iterator[None]:
    """Room for a graph of each layer, which a cache's number makes another one of, for each variant."""
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=8192):
        yield


def compile_layers(layers: Iterable[nn.Module]) -> Callable[[], None]:
    """Compile the forward pass of each, for all lengths; gives what undoes it. One that is compiled stays as it is."""
    changed = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in changed:
        layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)

    def undo() -> None:
        for layer in changed:
            vars(layer).pop("forward", None)

    return undo
