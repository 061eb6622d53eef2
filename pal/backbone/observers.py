"""Observers of an LLM at work: of how its attention is shared, of its residual stream, of its feed-forward networks."""

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
    """Attention probabilities of some rows in one layer; over `rows` and all `keys` together it sums to 1."""

    rows_BHNK: Tensor
    """Over the rows of the sequence, causal."""
    keys_BHNA: Mapping[int, Tensor]
    """Over each of the context's `keys` that joins the layer, by its number."""


class AttentionObserver(Protocol):
    """Observer that is shown the attention weights of each layer; nothing is stored for it."""

    rows_BN: Tensor
    """Which rows of the sequence it is shown: their numbers, N the same for all."""

    def attended(self, layer: int, weights: AttentionWeights) -> None:
        """The LLM's own attention in a layer."""
        ...

    def crossed(self, layer: int, which: int, weights_BHNA: Tensor) -> None:
        """Attention of a block before a layer to number `which` of the context's keys alone; sums to 1 or to 0."""
        ...


def attention_weights(q_BHQC: Tensor, k_BGKC: Tensor, seen_B1QK: Tensor, scale: float | None) -> Tensor:
    """Softmax of the scores, float32 [B, H, Q, K]: queries H, which may be a multiple of the keys' G.

    A query that sees no key gets zeros. Nothing of the attention that models run is used.
    """
    q_BGRQC = q_BHQC.float().unflatten(1, (k_BGKC.shape[1], -1))
    scores_BHQK = (q_BGRQC @ k_BGKC.float()[:, :, None].mT).flatten(1, 2)
    scores_BHQK = scores_BHQK * (q_BHQC.shape[-1] ** -0.5 if scale is None else scale)
    return scores_BHQK.masked_fill(~seen_B1QK, -torch.inf).softmax(-1).nan_to_num(0.0)


@contextmanager
def count_ffn_rows(llm: Backbone) -> Iterator[list[int]]:
    """Count, while the block lasts, the rows that each layer's feed-forward network is given: one number a layer."""
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
    """What `keep` takes of the rows [B, T, D] that enter the first layer and that leave each layer: L + 1 results.

    The last layer's rows are not normed yet. `keep` is called as each layer is done, so that one layer's rows live at
    a time.
    """
    kept = [keep(inputs.inputs_embeds_BTD)]
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(keep(out))) for block in llm.layers]
    try:
        llm.hidden(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
