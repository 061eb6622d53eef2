"""An LM head that shares the embeddings' weights: when it still does, and the gradient of both in one matrix.

Autograd would make one dense gradient for the head and one for the embeddings, and a third for their sum, each as large
as the vocabulary: three times a gigabyte for a Llama of 1B in float32, most of what a short step touches. Here the
embeddings' part stays a few rows until the head's is complete, and is added to it in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal.backbone import adapters


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


def tied_rows(lm: Any, known: TiedRows | None) -> TiedRows | None:
    """Lookup for embeddings that train together with the head; None where the module itself has to be called.

    Args:
        lm: transformers' model.
        known: what this gave before, which is kept while the weights are the same.
    """
    table, head = ends(lm)
    if not isinstance(table, nn.Embedding):  # PEFT adapts it
        return None
    weight = table.weight
    if not (torch.is_grad_enabled() and weight.requires_grad and head is not None and head.weight is weight):
        return None
    # hooks, such as those that put a sharded weight together, belong to the module
    if type(weight) is not nn.Parameter or table._forward_hooks or table._forward_pre_hooks:
        return None
    return known if known is not None and known.weight_VD is weight else TiedRows(weight)


def ends(lm: Any) -> tuple[Any, Any]:
    """Embeddings and head of an LLM."""
    return lm.get_input_embeddings(), lm.get_output_embeddings()


def note_ties(lm: Any) -> None:
    """Say in the configuration that head and embeddings are two matrices, where training has parted them.

    Whoever reads the configuration would make them one again.
    """
    table, head = (adapters.beneath(module) for module in ends(lm))
    if lm.config.tie_word_embeddings and head.weight.data_ptr() != table.weight.data_ptr():
        lm.config.tie_word_embeddings = False
        lm.all_tied_weights_keys = {}


def untie_head(lm: Any) -> None:
    """Give the head a matrix of its own, equal to the embeddings'."""
    head = adapters.beneath(lm.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    note_ties(lm)


def untie_adapted_head(lm: Any) -> None:
    """Untie a head that PEFT adapts apart from the embeddings, so that the adapter can be merged.

    Raises:
        PalError: one of the two is adapted in ways that cannot be merged.
    """
    adapters.check(*ends(lm))
    note_ties(lm)
    if lm.config.tie_word_embeddings and adapters.part(*ends(lm)):
        untie_head(lm)
