"""Loss and log-likelihood of labelled tokens; the LM head runs only on the rows that predict one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal.transfer import to_device
from pal.types import IGNORE, LLMInputs, Targets

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

Per = Literal["token", "answer"]
"""Equal weight in the loss for every token, so that long answers weigh more, or for every answer."""


def loss(llm: Backbone, inputs: LLMInputs, per: Per = "token") -> tuple[Tensor, int]:
    """Sum of the cross-entropies of labelled tokens, and their number; or sum of the answers' means, and their number.

    An answer is a run of labelled tokens.
    """
    targets = inputs.targets or targets_of(inputs)
    weights_N, count = None, sum(targets.lengths)
    if per == "answer":
        count = len(targets.lengths)
        shares_N = np.repeat(1.0 / np.array(targets.lengths or [1.0]), targets.lengths or [0])
        filled_N = np.pad(shares_N, (0, len(targets.rows_N) - len(shares_N)))
        weights_N = to_device(torch.tensor(filled_N, dtype=torch.float32), targets.rows_N.device)
    total = None
    if llm.loss_graphs is not None and torch.is_grad_enabled():
        total = llm.loss_graphs.total(llm, inputs, targets, weights_N, token_losses)
    if total is None:
        losses_N = token_losses(llm, inputs, targets)
        total = (losses_N if weights_N is None else losses_N * weights_N).sum()
    return total, count


def label_scores(llm: Backbone, inputs: LLMInputs) -> Tensor:
    """Sum of the log-likelihoods of each conversation's labelled tokens: float32 [B]."""
    targets = inputs.targets or targets_of(inputs)
    losses_N = token_losses(llm, inputs, targets)
    scores_B = losses_N.new_zeros(targets.conversations)
    return scores_B.index_add(0, targets.conversations_N, -losses_N)


def targets_of(inputs: LLMInputs) -> Targets:
    """Targets of inputs that come without them, read from `labels_BT`.

    The first token of a sequence does not count, since no row predicts it; nor does one right after padding.
    """
    assert inputs.labels_BT is not None, "inputs without labels"
    T = inputs.labels_BT.shape[1]
    next_BT = inputs.labels_BT[:, 1:].masked_fill(inputs.attention_mask_BT[:, :-1] == 0, IGNORE)
    row_N, column_N = (next_BT != IGNORE).nonzero(as_tuple=True)
    starts_N = torch.ones_like(row_N, dtype=torch.bool)
    starts_N[1:] = (row_N[1:] != row_N[:-1]) | (column_N[1:] != column_N[:-1] + 1)
    answers_N = starts_N.cumsum(0) - 1
    lengths = tuple(answers_N.bincount().tolist())
    return Targets(row_N * T + column_N, next_BT[row_N, column_N], row_N, lengths, len(next_BT))


def token_losses(llm: Backbone, inputs: LLMInputs, targets: Targets, head_VD: Tensor | None = None) -> Tensor:
    """Cross-entropy of each labelled token [N]; 0 for filling tokens, whose label is `IGNORE`.

    Args:
        llm: the LLM.
        inputs: the conversations.
        targets: tokens to predict.
        head_VD: used in place of the weight of a head that is a `plain_head`.
    """
    hidden_XD = llm.hidden(inputs).flatten(0, 1)
    logits_NV = _logits(llm.lm.lm_head, hidden_XD.index_select(0, targets.rows_N), head_VD)
    return F.cross_entropy(logits_NV.float(), targets.labels_N, reduction="none")


def plain_head(head: nn.Module) -> bool:
    """True if the head's output is the product with its weight, and no hook expects a call."""
    return type(head) is nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)


def _logits(head: nn.Module, hidden_ND: Tensor, head_VD: Tensor | None) -> Tensor:
    """Logits of some rows."""
    if not plain_head(head):
        assert head_VD is None
        logits_NV: Tensor = head(hidden_ND)
        return logits_NV
    weight_VD: Any = head.weight if head_VD is None else head_VD
    if hidden_ND.device.type != "cpu":
        return F.linear(hidden_ND, weight_VD)
    # vocabulary first: on a CPU up to 1.6 times as fast, and the weight's gradient has the weight's memory layout, so
    # that autograd accumulates in place
    product_NV: Tensor = (weight_VD @ hidden_ND.T).T
    return product_NV
