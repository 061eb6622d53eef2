"""PEFT's adapters as modules beside a model's own: whether there are some, and how they go into the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def has_adapters(root: nn.Module) -> bool:
    """Whether PEFT put anything in the place of a module: an adapter, or a copy of the module that is trained."""
    return "peft" in sys.modules and any(True for _ in _adapted(root))


def beneath(module: Any) -> Any:
    """The plain module that PEFT's adapter stands before; the module itself where there is none."""
    if hasattr(module, "token_adapter"):
        module = module.token_adapter
    return getattr(module, "base_layer", module)


def part(one: Any, other: Any) -> bool:
    """Whether two modules that have the same weights are adapted each in a way of its own, or one of them alone.

    Merged into the shared weights, an adapter of the one would change the other. Single rows of embeddings may be
    trained for both at once.
    """
    if hasattr(one, "token_adapter") and hasattr(other, "token_adapter"):
        return False
    return any(module is not beneath(module) for module in (one, other))


def merge(root: nn.Module) -> set[str]:
    """Put plain modules with the merged weights in the place of PEFT's; names of the weights that this may change."""
    changed = set()
    for name, module in list(_adapted(root)) if has_adapters(root) else []:
        if hasattr(module, "unload_and_optionally_merge_module"):  # a trained copy, or single rows of an embedding
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, plain)
        changed |= {f"{name}.{weight}" for weight in plain.state_dict()}
    return changed


def _adapted(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each that stands in the place of a plain one; what they are made of does not count."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
            yield name, module
