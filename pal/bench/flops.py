"""Counting operations, on every device alike: the one place that says what attention's own kernels count as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators that are counted below
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FORWARD = 2
"""Products of queries by keys by head width that attention makes forward; 2 operations each."""
_BACKWARD = 5
"""And backward, the scores a second time included, as torch counts its fused kernels."""


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also knows attention's fused kernel for the CPU and that for packed sequences.

    Every product counts in full, whatever of it a causal kernel leaves out; so counts compare across kernels.
    """
    return FlopCounterMode(display=False, custom_mapping=dict(_KERNELS))


def _cpu(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_backward(out: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(out, q, k, v)


def _packed(q: Tensor, k: Tensor, v: Tensor, first_q: Tensor, first_k: Tensor | None, *args: Any, **kwargs: Any) -> int:
    return _pairs(first_q, first_k) * 2 * _FORWARD * q.shape[-2] * q.shape[-1]


def _packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_q: Tensor,
    first_k: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _pairs(first_q, first_k) * 2 * _BACKWARD * q.shape[-2] * q.shape[-1]


def _pairs(first_q: Tensor, first_k: Tensor | None) -> int:
    """Pairs of a query and a key over all sequences, which start where these say."""
    return int((first_q.diff() * (first_q if first_k is None else first_k).diff()).sum())


# these read where the sequences start; the others are given shapes alone
_packed._get_raw = True  # type: ignore[attr-defined]
_packed_backward._get_raw = True  # type: ignore[attr-defined]

_KERNELS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
    torch.ops.torch_attn._varlen_attn: _packed,
    torch.ops.torch_attn._varlen_attn_backward: _packed_backward,
}
