"""Attention to one tile (a range of queries by a range of keys) on a CPU, with the log-sum-exp of its scores.

Public functions of torch either do not return the log-sum-exp or cannot compute gradients from a merged one, so the
CPU's flash kernel is called below SDPA. On a GPU rows are packed (`pal.backbone.packed`) or use one dense mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supports_split_attention(device: torch.device) -> bool:
    """True if attention to each set of keys separately is faster on this device than one mask over all keys."""
    return device.type == "cpu"


def attend(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, Q, C], and the log-sum-exp of the scores, float32 [B, H, Q].

    Args:
        q_BHQC: queries; H may be a multiple of G.
        k_BGKC: keys.
        v_BGKC: values.
        causal: query i sees keys up to i; Q equals K.
        mask: additive, [1 or B, 1, Q, K].
        scale: factor on the scores; None is 1 / sqrt(C).
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
    """Gradients of q, k and v. `out_BHQC` and `lse_BHQ` may be merged results over more keys than these."""
    given = [grad_BHQC, q_BHQC, k_BGKC, v_BGKC, out_BHQC, lse_BHQ]
    if q_BHQC.itemsize == 2:
        # in 16 bits it takes 4 to 8 times as long for short rows (docs/benchmarks/cpu_attention.py)
        given = [x.float() for x in given]
        mask = None if mask is None else mask.float()
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq.to(q_BHQC.dtype), dk.to(k_BGKC.dtype), dv.to(v_BGKC.dtype)
