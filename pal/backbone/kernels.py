"""Attention to one rectangle of queries by keys on a CPU, with the log-sum-exp of its scores.

Public functions of torch either keep the log-sum-exp to themselves or take no gradients with a merged one, so the CPU's
flash kernel is called below SDPA. On a GPU rows are packed (`pal.backbone.packed`); those that are not take one mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supports_split_attention(device: torch.device) -> bool:
    """Whether attention to one set of keys after the other is quicker here than one mask for all."""
    return device.type == "cpu"


def attend(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention -> [B, H, Q, C], and the log-sum-exp of its scores in float32 [B, H, Q].

    Args:
        q_BHQC: queries; H may be a multiple of G.
        k_BGKC: keys.
        v_BGKC: values.
        causal: query i sees keys up to i; there are as many of both.
        mask: added to the scores, [1 or B, 1, Q, K].
        scale: what scores are multiplied with; None is 1 / sqrt(C).
    """
    out_BHQC, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHQC, k_BGKC, v_BGKC, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out_BHQC, lse_BHQ


def attend_backward(
    grad_BHQC: Tensor,
    q_BHQC: Tensor,
    k_BGKC: Tensor,
    v_BGKC: Tensor,
    out_BHQC: Tensor,
    lse_BHQ: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out_BHQC` and `lse_BHQ` may be those of more keys than these."""
    given = (grad_BHQC, q_BHQC, k_BGKC, v_BGKC, out_BHQC, lse_BHQ)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv
