"""Observers of a forward pass: attention weights, residual stream, rows of the feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class AttentionWeights:
    """Attention probabilities of some queries in one layer; they sum to 1 over `rows` and all `keys` together."""

    rows_BHNK: Tensor
    """On the rows of the sequence, causal."""
    keys_BHNA: Mapping[int, Tensor]
    """On each audio key set that joins the layer, by its number among the context's `keys`."""


class AttentionObserver(Protocol):
    """Observer of each layer's attention weights, which are not stored."""

    rows_BN: Tensor
    """Indices of the rows whose attention is observed, N for each sequence."""

    def attended(self, layer: int, weights: AttentionWeights) -> None:
        """Called with the LLM's own attention in a layer."""
        ...

    def crossed(self, layer: int, which: int, weights_BHNA: Tensor) -> None:
        """Called with a cross-attention block's weights on `keys[which]` of the context; they sum to 1 or 0."""
        ...


def attention_weights(q_BHQC: Tensor, k_BGKC: Tensor, seen_B1QK: Tensor, scale: float | None) -> Tensor:
    """Softmax of the scores, float32 [B, H, Q, K]: queries H, which may be a multiple of the keys' G.

    A query that sees no key gets zeros. The computation is independent of the attention that models run.
    """
    q_BGRQC = q_BHQC.float().unflatten(1, (k_BGKC.shape[1], -1))
    scores_BHQK = (q_BGRQC @ k_BGKC.float()[:, :, None].mT).flatten(1, 2)
    scores_BHQK = scores_BHQK * (q_BHQC.shape[-1] ** -0.5 if scale is None else scale)
    return scores_BHQK.masked_fill(~seen_B1QK, -torch.inf).softmax(-1).nan_to_num(0.0)


@contextmanager
def count_ffn_rows(llm: Backbone) -> Iterator[list[int]]:
    """Count, while the block lasts, the input rows of each layer's feed-forward network: one number per layer."""
    counts = [0] * llm.n_layers

    def count(layer: int, network: nn.Module, given: tuple[Tensor, ...]) -> None:
        counts[layer] += given[0].shape[:-1].numel()

    networks = [block.mlp for block in llm.lm.model.layers]
    hooks = [network.register_forward_pre_hook(partial(count, layer)) for layer, network in enumerate(networks)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def residual_stream(llm: Backbone, inputs: LLMInputs, keep: Callable[[Tensor], Kept]) -> list[Kept]:
    """Results of `keep` on the rows [B, T, D] that enter the first layer and that leave each layer: L + 1.

    The last layer's rows come before the final norm. `keep` is called after each layer, so that only one layer's rows
    are in memory at a time.
    """
    kept = [keep(inputs.inputs_embeds_BTD)]
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(keep(out))) for block in llm.layers]
    try:
        llm.hidden(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
