"""Resuming a run: does a checkpoint fit, and its weights into the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pal.errors import ConfigError
from pal.model import PalModel
from pal.train import stages
from pal.train.checkpoint import Checkpoint


def check_data(found: Checkpoint, data: Mapping[str, str]) -> None:
    """Raise ConfigError if a checkpoint is of other data; `data` are the digests of each source now."""
    for name, digest in found.state.data.items():
        if data.get(name) != digest:
            raise ConfigError(f"data '{name}' changed since the run was started; restore it, or start a new run")
    new = sorted(set(data) - set(found.state.data))
    if new:
        raise ConfigError(f"data '{new[0]}' was missing when the run was started; remove it, or start a new run")


def fill(model: PalModel, head: Mapping[str, Tensor], found: Checkpoint) -> None:
    """Load a checkpoint's weights into the model and the weights of the objective (`stages.head`).

    Raises:
        ConfigError: a weight does not fit.
    """
    own = {**stages.named_weights(model), **head}
    with torch.no_grad():
        for name, tensor in found.weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ConfigError(f"{found.path}: its '{name}' does not fit the model of the recipe; start a new run")
            own[name].copy_(tensor)
