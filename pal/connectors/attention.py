"""Shared parts of connectors with queries: cross-attention to tokens of another width, sinusoidal positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Multi-head attention of queries to keys of another width."""

    def __init__(self, width: int, key_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(key_width, width)
        self.v = nn.Linear(key_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_WQE: Tensor, keys_WKE: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [W, Q, E] attend to keys [W, K, E'] where the mask, [W, K] or [W, Q, K], is True -> [W, Q, E]."""
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(x_WQE), self.k(keys_WKE), self.v(keys_WKE))
        )
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def default_heads(width: int) -> int:
    """Number of heads of width 64; 1 if `width` is not a multiple of 64."""
    return width // 64 if width % 64 == 0 else 1


def sinusoids(times_X: Tensor, width: int) -> Tensor:
    """Times [X], floating point -> [X, width]: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    half = -(-width // 2)
    rates = torch.exp(
        -math.log(10_000.0) / max(1, half - 1) * torch.arange(half, device=times_X.device, dtype=times_X.dtype)
    )
    angles = times_X[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
