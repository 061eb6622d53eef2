"""AdamW with a parameter group for each part, learning-rate schedules, and the optimizer's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pal.errors import BundleError
from pal.train.recipe import Stage

MASTER = "master"
"""State entry of a float32 master weight."""


def parameter_groups(trained: Mapping[str, Mapping[str, nn.Parameter]], stage: Stage) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: for each part, matrices with weight decay and vectors without.

    Args:
        trained: part -> name -> parameter. A part without a learning rate of its own ("head") takes
            the highest of the others.
    """
    groups = []
    for part, parameters in trained.items():
        lr = stage.lr.get(part, max(stage.lr.values())) if isinstance(stage.lr, dict) else stage.lr
        # vectors are norms and biases, which get no weight decay
        for decays in (True, False):
            names = [name for name, p in parameters.items() if (p.ndim > 1) == decays]
            if names:
                groups.append(
                    {
                        "params": [parameters[name] for name in names],
                        "weight_decay": stage.weight_decay if decays else 0.0,
                        "lr": lr,
                        "peak_lr": lr,
                        "part": part,
                    }
                )
    return groups


def adamw(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.AdamW:
    """Fused AdamW over `groups`, which can skip an update by a flag on the device (`found_inf`)."""
    return torch.optim.AdamW(groups, betas=stage.betas, fused=True)


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Learning rate at a step (from 0) relative to its maximum: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    assert schedule == "constant"
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set the learning rate of every group; returns that of each part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], masters: Iterable[Tensor] = ()
) -> dict[str, Tensor]:
    """AdamW's state as `parameter name/entry` -> tensor.

    Args:
        names: id of each parameter -> its name.
        masters: float32 master weights, saved as the entry `master`.
    """
    tensors: dict[str, Tensor] = {f"{names[id(parameter)]}/{MASTER}": parameter for parameter in masters}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            assert isinstance(value, Tensor), entry
            tensors[f"{names[id(parameter)]}/{entry}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state from `optimizer_tensors`.

    Raises:
        BundleError: the state belongs to other parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = tensor
    for name, entries in states.items():
        parameter = parameters.get(name)
        shapes = {value.shape for entry, value in entries.items() if entry != "step"}
        if parameter is None or shapes != {parameter.shape}:
            raise BundleError(
                f"checkpoint: optimizer state of '{name}' fits no parameter that the recipe trains; start a new run"
            )
        if MASTER in entries:
            with torch.no_grad():
                parameter.copy_(entries.pop(MASTER))
        if entries:
            # AdamW's step count is a tensor, on the parameter's device if fused
            optimizer.state[parameter] = {entry: value.to(parameter.device).clone() for entry, value in entries.items()}
