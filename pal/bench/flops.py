"""Counting operations, on every device alike: the one place that says what attention's own kernels count as.

torch's formulas for fused attention refuse grouped heads in some of its versions and know no packed sequences in
others; these know both, whatever torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators that are counted below
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """torch's counter with our formulas for attention's fused kernels, those of CPUs and of GPUs.

    Every product counts in full, whatever of it a causal kernel leaves out; so counts compare across kernels.
    """
    return FlopCounterMode(display=False, custom_mapping=_mapping())


def _made(pairs: int, q: Any, v: Any, heads: int) -> int:
    """The scores and the values they weigh: two products of queries by keys by width, 2 operations each."""
    return 2 * pairs * heads * (q[-1] + v[-1])


def _made_backward(pairs: int, q: Any, v: Any, heads: int) -> int:
    """Five products: the scores a second time, and the gradients of scores, q, k and v."""
    return 2 * pairs * heads * (3 * q[-1] + 2 * v[-1])


def _sdpa(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Shapes [B, H, Q, C] of queries, [B, G, K, C] of keys and values, where each of G heads serves H / G."""
    return _made(q[0] * q[2] * k[2], q, v, heads=q[1])


def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _made_backward(q[0] * q[2] * k[2], q, v, heads=q[1])


def _packed(
    q: Tensor, k: Tensor, v: Tensor, first_q: Tensor | None, first_k: Tensor | None, *args: Any, **kwargs: Any
) -> int:
    """Heads before the width: [B, Q, H, C], or [N, H, C] of sequences that start where `first_q` and `first_k` say."""
    return _made(_pairs(q, k, first_q, first_k, *args), q.shape, v.shape, heads=q.shape[-2])


def _packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_q: Tensor | None,
    first_k: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _made_backward(_pairs(q, k, first_q, first_k, *args), q.shape, v.shape, heads=q.shape[-2])


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Any, *args: Any, **kwargs: Any) -> int:
    return _packed(q, k, v, *args, **kwargs)


def _biased_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, *args: Any, **kwargs: Any
) -> int:
    return _packed_backward(grad, q, k, v, out, out, *args, **kwargs)


def _segments_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return _packed_backward(grad, q, k, v, q, q, *args, **kwargs)


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Any,
    offset: Any,
    bias: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _packed_backward(grad, q, k, v, out, lse, *args, **kwargs)


def _pairs(
    q: Tensor,
    k: Tensor,
    first_q: Tensor | None,
    first_k: Tensor | None,
    max_q: int | None = None,
    max_k: int | None = None,
    *args: Any,
) -> int:
    """Pairs of a query and a key over all sequences; those of the longest ones where starts cannot be read."""
    if first_q is None:
        return q.shape[0] * q.shape[-3] * k.shape[-3]
    first_k = first_q if first_k is None else first_k
    if first_q.is_meta or first_k.is_meta:
        return (first_q.shape[0] - 1) * int(max_q or 0) * int(max_k or 0)
    return int((first_q.diff().cpu() * first_k.diff().cpu()).sum())


# these read where sequences start; the others are given shapes alone
_READING: tuple[Any, ...] = (_packed, _packed_backward, _biased, _biased_backward, _segments_backward, _cudnn_backward)
for _formula in _READING:
    _formula._get_raw = True

_KERNELS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention": _sdpa,
    "aten._scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "aten._scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
    "aten._scaled_dot_product_efficient_attention": _sdpa,
    "aten._scaled_dot_product_efficient_attention_backward": _sdpa_backward,
    "aten._scaled_dot_product_cudnn_attention": _sdpa,
    "aten._scaled_dot_product_cudnn_attention_backward": _sdpa_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _sdpa,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _sdpa_backward,
    "aten._flash_attention_forward": _packed,
    "aten._flash_attention_backward": _packed_backward,
    "aten._efficient_attention_forward": _biased,
    "aten._efficient_attention_backward": _biased_backward,
    "aten._cudnn_attention_forward": _biased,
    "aten._cudnn_attention_backward": _cudnn_backward,
    "pal.segment_attention": _packed,
    "pal.segment_attention_backward": _segments_backward,
    "torch_attn._varlen_attn": _packed,
    "torch_attn._varlen_attn_backward": _packed_backward,
}
"""Operator, as `torch.ops` names it -> its formula."""


def _mapping() -> dict[Any, Callable[..., int]]:
    """Those of the operators that this torch has, or that were registered since."""
    found = {}
    for name, formula in _KERNELS.items():
        space, operator = name.split(".")
        packet = getattr(getattr(torch.ops, space), operator, None)
        if packet is not None:
            found[packet] = formula
    return found
