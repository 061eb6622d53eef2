"""Bias on the attention scores of audio keys, as further columns of queries and keys.

A query's extra column holds the bias, a key's extra column is 1 where the bias applies and 0 elsewhere. So every
attention kernel applies it without a mask, and its gradient is that of a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Mapping[int, Tensor]
"""Bias on the scores of a set of keys by layer: [H] for each head, or [1] for all."""

KeyScale = Mapping[int, Tensor]
"""Factor on a set of keys by layer, [G]."""

COLUMNS = 8
"""The number of extra columns is a multiple of this, as CUDA kernels need it."""


def with_bias(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float | None
) -> tuple[Tensor, list[Tensor], list[Tensor], float]:
    """Queries, keys and values [..., C] with extra columns that add a bias to the scores of some key sets.

    Args:
        q: queries.
        keys: keys of each set.
        values: values of each set; they get as many columns of zeros, since kernels want one width.
        biases: bias of each set, with the axes of `q` from the heads to the one before C; None without.
        scale: factor on the scores; None is 1 / sqrt(C).

    Returns:
        Queries, keys, values and the factor on the scores. The output's columns beyond C are 0.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    biased = [i for i, bias in enumerate(biases) if bias is not None]
    more = -(-len(biased) // COLUMNS) * COLUMNS
    rows = torch.stack([(bias / factor).to(q.dtype) for bias in biases if bias is not None], -1)
    q = torch.cat((q, F.pad(rows, (0, more - len(biased))).expand(*q.shape[:-1], more)), -1)
    wide = []
    for i, k in enumerate(keys):
        columns = k.new_zeros(more)
        if i in biased:
            columns[biased.index(i)] = 1
        wide.append(torch.cat((k, columns.expand(*k.shape[:-1], more)), -1))
    return q, wide, [F.pad(v, (0, more)) for v in values], factor
