"""Where the LM head has the embeddings' weights: the gradient of both without a second matrix of the vocabulary.

Autograd would make one dense gradient for the head and one for the embeddings, and a third for their sum, each as large
as the vocabulary: three times a gigabyte for a Llama of 1B in float32, most of what a short step touches. Here the
embeddings' part stays a few rows until the head's is complete, and is added to it in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedRows:
    """Looks up rows of a matrix that also is the LM head's."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        self.weight_VD = weight_VD
        self._waiting: list[tuple[Tensor, Tensor]] = []
        # runs when all that is to be added to the gradient has arrived, and before anything reads it
        weight_VD.register_hook(self._added)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has a matrix of its own, and makes this anew when it trains."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None in a pickle, for the same reason: the hook would not be in it."""
        return type(None), ()

    def __call__(self, ids: Tensor, padding: int | None) -> Tensor:
        """Rows [..., D] of ids [...]; `padding` is an id whose row gets no gradient."""
        self._waiting.clear()  # of a backward pass that was broken off
        rows: Tensor = _Lookup.apply(self.weight_VD, ids, padding, self)
        return rows

    def remember(self, ids_X: Tensor, grad_XD: Tensor) -> None:
        """A gradient of some rows, to be added when the head's is there."""
        self._waiting.append((ids_X, grad_XD))

    def _added(self, grad_VD: Tensor | None) -> Tensor | None:
        weight, waiting = self.weight_VD, self._waiting.copy()
        self._waiting.clear()
        total_VD = grad_VD
        if grad_VD is None:  # the head took no part, and a hook may not give a gradient where there was none
            weight.grad = total_VD = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert total_VD is not None
        for ids_X, grad_XD in waiting:
            total_VD.index_add_(0, ids_X, grad_XD.to(total_VD.dtype))
        return grad_VD


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding: int | None, tied: TiedRows) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.tied = padding, tied
        return F.embedding(ids, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        ids_X, grad_XD = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            grad_XD = grad_XD.masked_fill((ids_X == ctx.padding)[:, None], 0.0)
        ctx.tied.remember(ids_X, grad_XD)
        return None, None, None, None
