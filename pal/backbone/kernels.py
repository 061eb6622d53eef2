"""Attention to one tile (a range of queries by a range of keys), with the log-sum-exp of its scores.

Public functions of torch either do not return the log-sum-exp or cannot compute gradients from a merged one, so the
CPU's flash kernel is called below SDPA. On a GPU rows are packed (`pal.backbone.packed`) or use one dense mask; only
continuations of prompts (`pal.backbone.shared_prefix`) come here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pal.backbone.varlen import has_kernel


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
        mask: additive, [1 or B, 1 or H, Q, K].
        scale: factor on the scores; None is 1 / sqrt(C).
    """
    if q_BHQC.device.type != "cpu":
        return attend_elsewhere(q_BHQC, k_BGKC, v_BGKC, causal, mask, scale)
    out_BHQC, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHQC, k_BGKC, v_BGKC, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out_BHQC, lse_BHQ


def attend_elsewhere(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend` on other devices, without gradients: by the flash kernel where it supports the call, else written out.

    With masks or grouped heads scores are kept in memory: few, as queries are those of decoding or of short texts.
    """
    B, H, Q, C = q_BHQC.shape
    G, K = k_BGKC.shape[1:3]
    if mask is None and H == G and has_kernel(q_BHQC.device, q_BHQC.dtype, C) and (Q == K or not causal):
        out_BHQC, lse_BHQ, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BHQC, k_BGKC, v_BGKC, 0.0, causal, False, scale=scale
        )
        return out_BHQC, lse_BHQ
    wide = torch.promote_types(q_BHQC.dtype, torch.float32)  # scores of 16 bits would be too coarse
    q_BGXC = (q_BHQC.to(wide) * (C**-0.5 if scale is None else scale)).reshape(B, G, -1, C)
    scores_BHQK = (q_BGXC @ k_BGKC.to(wide).mT).reshape(B, H, Q, K)
    if mask is not None:
        scores_BHQK = scores_BHQK + mask
    if causal:
        scores_BHQK = scores_BHQK.masked_fill(~scores_BHQK.new_ones(Q, K, dtype=torch.bool).tril(), -torch.inf)
    lse_BHQ = scores_BHQK.logsumexp(-1)
    p_BGXK = (scores_BHQK - lse_BHQ[..., None]).exp().to(v_BGKC.dtype).reshape(B, G, -1, K)
    return (p_BGXK @ v_BGKC).reshape(B, H, Q, C), lse_BHQ


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
