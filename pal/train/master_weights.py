"""Float32 master weights for training in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pal.errors import ConfigError
from pal.train.recipe import Stage

Parts = Mapping[str, Mapping[str, nn.Parameter]]
"""part -> name -> parameter."""


class MasterWeights:
    """Float32 master weights of parameters that have fewer bits; the optimizer updates the master weights.

    A weight in bfloat16 has 8 bits of precision, so an update of less than 1/512 of its value is rounded away. The
    master weight accumulates such updates; the weight is always the rounded master weight.

    Args:
        parts: the trained weights.
        on: if False, no weight has a master weight.
        complete: called before gradients are taken, to complete those of `parts`.
    """

    def __init__(self, parts: Parts, on: bool, complete: Callable[[], None] | None = None) -> None:
        self._complete = complete
        self.parts: dict[str, dict[str, nn.Parameter]] = {}
        """`parts`, with weights replaced by their master weights if they have one."""
        self.copies: list[Tensor] = []
        """All master weights."""
        self._weights: list[Tensor] = []
        for part, parameters in parts.items():
            held = self.parts[part] = dict(parameters)
            for name, weight in parameters.items() if on else ():
                if weight.dtype in (torch.bfloat16, torch.float16):
                    held[name] = nn.Parameter(weight.detach().float())
                    self._weights.append(weight)
                    self.copies.append(held[name])

    def take_gradients(self) -> None:
        """Add the weights' gradients to those of the master weights, to sum, scale and clip them in float32."""
        if self._complete is not None:
            self._complete()
        for weight, copy in zip(self._weights, self.copies, strict=True):
            if weight.grad is not None:
                more = weight.grad.float()
                copy.grad = more if copy.grad is None else copy.grad.add_(more)
                weight.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Copy the master weights into the weights, rounded."""
        if self.copies:
            torch._foreach_copy_(self._weights, self.copies)


def masters_of(parameters: Parts, stage: Stage, complete: Callable[[], None] | None = None) -> MasterWeights:
    """Trained weights of a stage with the master weights that it asks for; `complete` as of `MasterWeights`.

    Raises:
        ConfigError: it asks for some, but no trained weight is in bfloat16.
    """
    masters = MasterWeights(parameters, stage.master_weights, complete)
    if stage.master_weights and not masters.copies:
        raise ConfigError(
            f"stage '{stage.name}': 'master_weights' needs trained weights in bfloat16, but there are none; set the "
            "model's 'llm.dtype' to bfloat16, or remove the key"
        )
    return masters
