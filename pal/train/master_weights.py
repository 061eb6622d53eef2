"""Weights that train in bfloat16, each beside a float32 copy that the optimizer works on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Parts = Mapping[str, Mapping[str, nn.Parameter]]
"""part -> name -> parameter."""


class MasterWeights:
    """Float32 master weights of parameters that have fewer bits; the optimizer works on them.

    A weight in bfloat16 has 8 bits of precision, so that an update of less than 1/512 of it is rounded away. Its copy
    keeps what is too small to be seen yet; the weight is always the copy, rounded.

    Args:
        parts: the trained weights.
        on: False lets every weight stand for itself.
    """

    def __init__(self, parts: Parts, on: bool) -> None:
        self.parts: dict[str, dict[str, nn.Parameter]] = {}
        """As given, with the copies in their weights' places."""
        self.copies: list[Tensor] = []
        self._weights: list[Tensor] = []
        for part, parameters in parts.items():
            held = self.parts[part] = dict(parameters)
            for name, weight in parameters.items() if on else ():
                if weight.dtype in (torch.bfloat16, torch.float16):
                    held[name] = nn.Parameter(weight.detach().float())
                    self._weights.append(weight)
                    self.copies.append(held[name])

    def take_gradients(self) -> None:
        """Add the weights' gradients to those of the copies, so that they are summed, scaled and clipped in float32."""
        for weight, copy in zip(self._weights, self.copies, strict=True):
            if weight.grad is not None:
                more = weight.grad.float()
                copy.grad = more if copy.grad is None else copy.grad.add_(more)
                weight.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the copies into the weights."""
        if self.copies:
            torch._foreach_copy_(self._weights, self.copies)
