"""PEFT's adapters as modules beside a model's own: whether there are some, and how they go into the weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def has_adapters(root: nn.Module) -> bool:
    """Whether PEFT put anything in the place of a module: an adapter, or a copy of the module that is trained."""
    return any(True for _ in _adapted(root))


def merge(root: nn.Module) -> set[str]:
    """Put plain modules with the merged weights in the place of PEFT's; names of the weights that this may change."""
    changed = set()
    for name, module in list(_adapted(root)):
        if hasattr(module, "unload_and_optionally_merge_module"):  # a trained copy, or single rows of an embedding
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)  # type: ignore[operator]
            plain = module.get_base_layer()  # type: ignore[operator]
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, plain)
        changed |= {f"{name}.{weight}" for weight in plain.state_dict()}
    return changed


def _adapted(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
