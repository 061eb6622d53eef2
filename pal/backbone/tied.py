"""Tied embeddings: whether LM head and embeddings still share their weights, and one gradient matrix for both.

Autograd would allocate a dense gradient for the head, one for the embeddings and one for their sum, each as large as
the vocabulary: three times a gigabyte for a Llama of 1B in float32, most of the memory that a short step touches. Here
the embeddings' gradient stays sparse, a few rows, until the head's is complete, and is added to it in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal.backbone import adapters


class TiedRows:
    """Embedding lookup in a matrix that is also the LM head's."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        self.weight_VD = weight_VD
        self._waiting: list[tuple[Tensor, Tensor]] = []
        # runs after all contributions to the gradient have been added, and before anything reads it
        weight_VD.register_hook(self._added)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied model has its own matrix, and builds this again when it trains."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None, for the same reason: the hook is not pickled."""
        return type(None), ()

    def __call__(self, ids: Tensor, padding: int | None) -> Tensor:
        """Rows [..., D] of ids [...]; `padding` is the id whose row gets no gradient."""
        self._waiting.clear()  # left by an interrupted backward pass
        rows: Tensor = _Lookup.apply(self.weight_VD, ids, padding, self)
        return rows

    def remember(self, ids_X: Tensor, grad_XD: Tensor) -> None:
        """Store the gradient of some rows until the head's gradient is complete."""
        self._waiting.append((ids_X, grad_XD))

    def _added(self, grad_VD: Tensor | None) -> Tensor | None:
        weight, waiting = self.weight_VD, self._waiting.copy()
        self._waiting.clear()
        total_VD = grad_VD
        if grad_VD is None:  # the head was not used, and a hook cannot return a gradient where there was none
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
    """`TiedRows` for embeddings that train together with the head; None where the embedding module must be called.

    Args:
        lm: transformers' model.
        known: an earlier result, returned again while the weights are the same.
    """
    table, head = ends(lm)
    if not isinstance(table, nn.Embedding):  # PEFT adapts it
        return None
    weight = table.weight
    if not (torch.is_grad_enabled() and weight.requires_grad and head is not None and head.weight is weight):
        return None
    # hooks, such as those that gather a sharded weight, run only if the module is called
    if type(weight) is not nn.Parameter or table._forward_hooks or table._forward_pre_hooks:
        return None
    return known if known is not None and known.weight_VD is weight else TiedRows(weight)


def has_gradient_hooks(weight: nn.Parameter) -> bool:
    """True if the weight has hooks on its gradient besides that of `TiedRows`."""
    hooks = weight._backward_hooks or {}
    others = any(getattr(hook, "__func__", None) is not TiedRows._added for hook in hooks.values())
    return others or bool(weight._post_accumulate_grad_hooks)


def shared_weight(lm: Any) -> nn.Parameter | None:
    """The weight that embeddings and LM head share; None where each has its own."""
    table, head = ends(lm)
    weight = getattr(table, "weight", None)
    return weight if head is not None and weight is not None and getattr(head, "weight", None) is weight else None


def ends(lm: Any) -> tuple[Any, Any]:
    """Embedding and LM head modules of an LLM."""
    return lm.get_input_embeddings(), lm.get_output_embeddings()


def note_ties(lm: Any) -> None:
    """Set `tie_word_embeddings` to False in the configuration where head and embeddings are two matrices.

    Otherwise, loading by the configuration would tie them again.
    """
    table, head = (adapters.beneath(module) for module in ends(lm))
    if lm.config.tie_word_embeddings and head.weight.data_ptr() != table.weight.data_ptr():
        lm.config.tie_word_embeddings = False
        lm.all_tied_weights_keys = {}


def untie_head(lm: Any) -> None:
    """Give the head its own copy of the embeddings' matrix."""
    head = adapters.beneath(lm.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    note_ties(lm)


def untie_adapted_head(lm: Any) -> None:
    """Untie a head that PEFT adapts separately from the embeddings, so that the adapter can be merged.

    Raises:
        PalError: one of the two has adapters that cannot be merged.
    """
    adapters.check(*ends(lm))
    note_ties(lm)
    if lm.config.tie_word_embeddings and adapters.part(*ends(lm)):
        untie_head(lm)
