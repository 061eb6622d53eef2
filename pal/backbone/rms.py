"""RMSNorm as one operation, forward and backward.

On a GPU torch has a kernel for it. Elsewhere one custom operation with the same signature computes it, so that the
operations of a GPU's step can be counted on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows [M, D] (Zhang and Sennrich 2019); sums are in float32 or more."""
    if x_MD.device.type == "cuda" or torch.compiler.is_compiling():
        return F.rms_norm(x_MD, weight_D.shape, weight_D, eps)
    normed: Tensor = _plain(x_MD, weight_D, eps)
    return normed


@torch.library.custom_op("pal::rms_norm", mutates_args=())
def _plain(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_MD, weight_D.shape, weight_D, eps)


@_plain.register_fake
def _plain_fake(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_MD)


@torch.library.custom_op("pal::rms_norm_backward", mutates_args=())
def _plain_backward(grad_MD: Tensor, x_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weight."""
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    x, grad = x_MD.to(wide), grad_MD.to(wide)
    scale_M1 = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = grad * weight_D
    dx = scale_M1 * (scaled - x * (scaled * x).mean(-1, keepdim=True) * scale_M1.square())
    return dx.to(x_MD.dtype), (grad * x * scale_M1).flatten(0, -2).sum(0).to(weight_D.dtype)


@_plain_backward.register_fake
def _plain_backward_fake(grad_MD: Tensor, x_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MD), torch.empty_like(weight_D)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _differentiate(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = _plain_backward(grad_MD, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None


_plain.register_autograd(_differentiate, setup_context=_keep)
