"""Variable-length attention: packed segments of any number and lengths in one kernel call.

Query i of a segment with Q queries and K keys sees its keys up to i + K - Q, so that the last query sees all
(bottom-right causal); without `causal` each query sees all. On a GPU the kernel is
`torch.nn.attention.varlen.varlen_attn`, whose flash kernel takes grouped heads without copies; elsewhere a function
with the same signature computes segment by segment, so that tests on a CPU cover the packed path.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_HALF = (torch.float16, torch.bfloat16)


def has_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """True if the flash kernel supports queries on this device, of this dtype and head width."""
    fits = dtype in _HALF and head_width % 8 == 0 and head_width <= 256
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def segment_attention(
    q_NHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention within segments -> [N, H, C]. A segment without keys gives zeros.

    Args:
        q_NHC: queries; H may be a multiple of G.
        k_KGC: keys. v_KGC: values.
        cu_seqlens_q: where each segment's queries start, and where the last ends: int32 [segments + 1].
        cu_seqlens_k: the same of its keys.
        max_seqlen_q: queries of the longest segment, or an upper bound.
        max_seqlen_k: the same for keys.
        causal: bottom-right causal; else each query sees all keys of its segment.
        window: sliding window in keys, the last key that the query sees included; None means all.
        scale: factor on the scores; None is 1 / sqrt(C).
    """
    sizes = (max_seqlen_q, max_seqlen_k, causal, window, scale)
    if q_NHC.device.type == "cuda":
        return flash(q_NHC, k_KGC, v_KGC, cu_seqlens_q, cu_seqlens_k, *sizes)
    out_NHC: Tensor = _plain(q_NHC, k_KGC, v_KGC, cu_seqlens_q, cu_seqlens_k, *sizes)
    return out_NHC


def flash(
    q_NHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`segment_attention` with torch's flash kernel, on a GPU."""
    shown = (-1 if window is None else window - 1, 0 if causal else -1)
    options: dict[str, Any] = {"window_size": shown, "scale": scale, **_grouped()}
    out_NHC = varlen_attn(q_NHC, k_KGC, v_KGC, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    assert isinstance(out_NHC, Tensor)  # alone, without the log-sum-exp that can be asked for
    return out_NHC


@cache
def _grouped() -> dict[str, bool]:
    # torch 2.11 takes grouped heads without an option
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@torch.library.custom_op("pal::segment_attention", mutates_args=())
def _plain(
    q_NHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`segment_attention` with SDPA, segment by segment."""
    out_NHC = torch.zeros_like(q_NHC)
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        if keys.stop > keys.start:
            out_NHC[queries] = _one(q_NHC[queries], k_KGC[keys], v_KGC[keys], causal, window, scale)
    return out_NHC


@_plain.register_fake
def _plain_fake(q_NHC: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(q_NHC)


@torch.library.custom_op("pal::segment_attention_backward", mutates_args=())
def _plain_backward(
    grad_NHC: Tensor,
    q_NHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = tuple(torch.zeros_like(x) for x in (q_NHC, k_KGC, v_KGC))
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        if queries.stop > queries.start and keys.stop > keys.start:
            given = (grad_NHC[queries], q_NHC[queries], k_KGC[keys], v_KGC[keys])
            found = _one_backward(*given, causal, window, scale)
            for grad, at, part in zip(grads, (queries, keys, keys), found, strict=True):
                grad[at] = part
    return grads[0], grads[1], grads[2]


@_plain_backward.register_fake
def _plain_backward_fake(grad_NHC: Tensor, q_NHC: Tensor, k_KGC: Tensor, v_KGC: Tensor, *args: Any) -> Any:
    return torch.empty_like(q_NHC), torch.empty_like(k_KGC), torch.empty_like(v_KGC)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.sizes = inputs[5:]


def _differentiate(ctx: Any, grad_NHC: Tensor) -> tuple[Any, ...]:
    return (*_plain_backward(grad_NHC, *ctx.saved_tensors, *ctx.sizes), *(None for _ in range(7)))


_plain.register_autograd(_differentiate, setup_context=_keep)


def _segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


def _one(q_QHC: Tensor, k_KGC: Tensor, v_KGC: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QHC, k_KGC, v_KGC))
    seen_QK = _seen(len(q_QHC), len(k_KGC), causal, window)
    out_1HQC = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_QK, scale=scale, enable_gqa=True)
    return out_1HQC[0].transpose(0, 1)


def _one_backward(
    grad_QHC: Tensor,
    q_QHC: Tensor,
    k_KGC: Tensor,
    v_KGC: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q_QHC.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q_QHC.dtype, torch.float32)
    # queries and gradients by group of heads: [G, R, Q, C]
    q_GRQC, grad_GRQC = (x.to(wide).unflatten(1, (k_KGC.shape[1], -1)).permute(1, 2, 0, 3) for x in (q_QHC, grad_QHC))
    k_G1KC, v_G1KC = (x.to(wide).transpose(0, 1)[:, None] for x in (k_KGC, v_KGC))
    unseen_QK = ~_seen(len(q_QHC), len(k_KGC), causal, window)
    p_GRQK = (scale * q_GRQC @ k_G1KC.mT).masked_fill(unseen_QK, -torch.inf).softmax(-1)
    dp_GRQK = grad_GRQC @ v_G1KC.mT
    ds_GRQK = scale * p_GRQK * (dp_GRQK - (p_GRQK * dp_GRQK).sum(-1, keepdim=True))
    dq_QHC = (ds_GRQK @ k_G1KC).permute(2, 0, 1, 3).flatten(1, 2)
    dk_KGC, dv_KGC = ((a.mT @ b).sum(1).transpose(0, 1) for a, b in ((ds_GRQK, q_GRQC), (p_GRQK, grad_GRQC)))
    return dq_QHC, dk_KGC, dv_KGC


def _seen(Q: int, K: int, causal: bool, window: int | None) -> Tensor:
    distance_QK = torch.arange(Q)[:, None] + K - Q - torch.arange(K)
    seen_QK = (distance_QK >= 0) | (not causal)
    return seen_QK if window is None else seen_QK & (distance_QK < window)
