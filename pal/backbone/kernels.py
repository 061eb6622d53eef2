"""Attention to one rectangle of queries by keys, with the log-sum-exp of its scores, by the fastest kernel there is.

Public functions of torch either keep the log-sum-exp to themselves or take no gradients with a merged one, so the flash
kernels are called below SDPA. Elsewhere the same is written out in matrix products.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def takes_apart(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether attention to one set of keys after the other has fast kernels here; else one mask for all is quicker.

    On a GPU the kernels are tried once, in values and gradients.

    Args:
        device: of the queries.
        dtype: of the queries.
        head_width: C.
    """
    if device.type == "cpu":
        return True
    flash = device.type == "cuda" and dtype in _HALF and head_width % 8 == 0 and head_width <= 256
    return flash and torch.cuda.get_device_capability(device) >= (8, 0) and _right(str(device), dtype, head_width)


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
    if q_BHQC.device.type == "cpu":
        out_BHQC, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHQC, k_BGKC, v_BGKC, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out_BHQC, lse_BHQ
    if q_BHQC.device.type == "cuda" and mask is None:
        out_BHQC, lse_BHQ, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BHQC, k_BGKC, v_BGKC, 0.0, causal, False, scale=scale
        )
        return out_BHQC, lse_BHQ
    return plain(q_BHQC, k_BGKC, v_BGKC, causal, mask, scale)


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
    if q_BHQC.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    if q_BHQC.device.type == "cuda" and mask is None:
        seed = torch.zeros(2, dtype=torch.uint64, device=q_BHQC.device)  # of dropout, which there is none of
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, q_BHQC.shape[2], k_BGKC.shape[2], 0.0, causal, seed, seed[0], scale=scale
        )
        return dq, dk, dv
    return plain_backward(*given, causal, mask, scale)


def plain(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend` in matrix products, on any device."""
    scores_BGRK = _scores(q_BHQC, k_BGKC, causal, mask, scale)
    lse_BGR1 = scores_BGRK.logsumexp(-1, keepdim=True)
    out_BGRC = (scores_BGRK - lse_BGR1).exp().to(v_BGKC.dtype) @ v_BGKC
    return out_BGRC.reshape(q_BHQC.shape), lse_BGR1.reshape(q_BHQC.shape[:3])


def plain_backward(
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
    """`attend_backward` in matrix products, on any device."""
    G = k_BGKC.shape[1]
    grad_BGRC, q_BGRC, out_BGRC = (_grouped(x, G) for x in (grad_BHQC, q_BHQC, out_BHQC))
    p_BGRK = (_scores(q_BHQC, k_BGKC, causal, mask, scale) - lse_BHQ.reshape(*q_BGRC.shape[:3], 1)).exp()
    mean_BGR1 = (_wide(grad_BGRC) * _wide(out_BGRC)).sum(-1, keepdim=True)
    ds_BGRK = p_BGRK * (_wide(grad_BGRC @ v_BGKC.mT) - mean_BGR1) * _scale(q_BHQC, scale)
    p_BGRK, ds_BGRK = p_BGRK.to(q_BHQC.dtype), ds_BGRK.to(q_BHQC.dtype)
    dq_BGRC = ds_BGRK @ k_BGKC
    return dq_BGRC.reshape(q_BHQC.shape), ds_BGRK.mT @ q_BGRC, p_BGRK.mT @ grad_BGRC


def _scores(q_BHQC: Tensor, k_BGKC: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    """[B, G, R, K]: the queries of a group's heads one after the other."""
    Q, K, G = q_BHQC.shape[2], k_BGKC.shape[2], k_BGKC.shape[1]
    scores_BGRK = _wide(_grouped(q_BHQC, G) @ k_BGKC.mT) * _scale(q_BHQC, scale)
    if causal:
        future_QK = torch.ones(Q, K, dtype=torch.bool, device=q_BHQC.device).triu(1)
        mask = torch.zeros(1, 1, Q, K, device=q_BHQC.device).masked_fill(future_QK, -torch.inf)
    return (
        scores_BGRK
        if mask is None
        else scores_BGRK + mask.to(scores_BGRK.dtype).repeat(1, 1, scores_BGRK.shape[2] // Q, 1)
    )


def _grouped(x_BHQC: Tensor, G: int) -> Tensor:
    return x_BHQC.unflatten(1, (G, -1)).flatten(2, 3)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _scale(q_BHQC: Tensor, scale: float | None) -> float:
    return float(q_BHQC.shape[-1] ** -0.5) if scale is None else scale


@cache
def _right(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the kernels of a device give what matrix products give."""
    error = worst(device, dtype, head_width)
    if error < 0.02:
        return True
    warnings.warn(
        f"attention kernels of {device} are off by {error:.3g}; audio and text are attended to under one mask instead",
        stacklevel=2,
    )
    return False


def worst(device: str, dtype: torch.dtype, head_width: int) -> float:
    """Largest error of a device's kernels, in values and gradients, where all are about 1; infinite if they fail."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    found = 0.0
    try:
        for heads, queries, keys, causal in ((4, 40, 40, True), (4, 40, 70, False), (2, 1, 33, False)):
            q, k, v = drawn(2, heads, queries, head_width), drawn(2, 2, keys, head_width), drawn(2, 2, keys, head_width)
            grad = drawn(*q.shape)
            two = torch.tensor(2.0, device=device)
            out, lse = attend(q, k, v, causal, None, None)
            # as if other keys had been merged in that double the sum of exponentials
            grads = attend_backward(grad, q, k, v, 0.5 * out, lse + two.log(), causal, None, None)
            q, k, v, grad = (x.double() for x in (q, k, v, grad))
            exact, exact_lse = plain(q, k, v, causal, None, None)
            right = plain_backward(grad, q, k, v, 0.5 * exact, exact_lse + two.log(), causal, None, None)
            pairs = zip((out, lse, *grads), (exact, exact_lse, *right), strict=True)
            found = max(found, *(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs))
    except RuntimeError:  # a kernel that is not there
        return float("inf")
    return found
