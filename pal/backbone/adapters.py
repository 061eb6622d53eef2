"""PEFT adapters in a model: find them, check them, merge them into the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pal.errors import PalError


def has_adapters(root: nn.Module) -> bool:
    """PEFT replaced a module: by one with an adapter, or by a copy that is trained."""
    return "peft" in sys.modules and any(True for _ in _adapted(root))


def beneath(module: Any) -> Any:
    """The base module under PEFT's adapter; the module itself where there is none."""
    if hasattr(module, "token_adapter"):
        module = module.token_adapter
    return getattr(module, "base_layer", module)


def part(one: Any, other: Any) -> bool:
    """True if two modules with the same weights have different adapters, or only one of them has any.

    Merging the adapter of one into the shared weights would change the other. Trained single rows that both modules
    share are allowed.
    """
    if hasattr(one, "token_adapter") and hasattr(other, "token_adapter"):
        return one.token_adapter.trainable_tokens_delta is not other.token_adapter.trainable_tokens_delta
    return any(module is not beneath(module) for module in (one, other))


def check(*modules: Any) -> None:
    """Check that no module is adapted in two ways at once.

    Raises:
        PalError: rows that are trained beneath LoRA, or beneath a copy; PEFT merges both into wrong weights.
    """
    for module in modules if "peft" in sys.modules else ():
        rows = [part for part in module.modules() if hasattr(part, "token_adapter")]
        if rows and len(list(_adapters_in(module))) > 1:
            raise PalError(
                "PEFT: trainable_token_indices on a module that LoRA or modules_to_save adapts too, or on one that is "
                "tied to it, cannot be merged; leave one of the two out"
            )


def drop_empty(root: nn.Module) -> None:
    """Restore the plain module where PEFT's holds no adapter any more, as `delete_adapter` leaves it."""
    for name, module in list(_adapted(root)) if has_adapters(root) else []:
        if not module._get_available_adapters():
            parent, _, last = name.rpartition(".")
            plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module
            setattr(root.get_submodule(parent), last, plain)


def merge(root: nn.Module) -> set[str]:
    """Replace PEFT's modules by plain ones with merged weights; names of the weights that may have changed."""
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


@contextmanager
def disabled(root: nn.Module) -> Iterator[None]:
    """Context manager in which LoRA adapters do nothing; trained copies and single rows stay as they are.

    It changes the modules themselves, so that no other thread may use them meanwhile.
    """
    if "peft" not in sys.modules:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in root.modules() if isinstance(part, BaseTunerLayer) and not part.disable_adapters]
    trained = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained.items():  # PEFT turns gradients on
            parameter.requires_grad_(was)


def _adapters_in(module: nn.Module) -> Iterator[nn.Module]:
    """Adapters of a PEFT module and of the modules inside it; an adapter of single rows counts once."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for part in module.modules():
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(part, TrainableTokensLayer):
            yield part


def _adapted(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each PEFT module that replaced a plain one; its submodules are not listed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
            yield name, module
