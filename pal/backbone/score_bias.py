"""Bias on the attention scores of audio, as further columns of queries and keys.

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

SetBias = tuple[Tensor, Tensor | None]
"""Bias in one layer, with the axes of the queries from the heads to the one before C, and the keys of a set that it
applies to, bool, broadcastable to the keys without C; None for all of them."""

COLUMNS = 8
"""The number of extra columns is a multiple of this, as CUDA kernels need it."""


def with_bias(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    biases: Sequence[Sequence[SetBias]],
    scale: float | None,
) -> tuple[Tensor, list[Tensor], list[Tensor], float]:
    """Queries, keys and values [..., C] with extra columns that add biases to the scores of some keys.

    Args:
        q: queries.
        keys: keys of each set.
        values: values of each set; they get as many columns of zeros, since kernels want one width.
        biases: biases of each set.
        scale: factor on the scores; None is 1 / sqrt(C).

    Returns:
        Queries, keys, values and the factor on the scores. The output's columns beyond C are 0.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    each = [(number, bias, marked) for number, own in enumerate(biases) for bias, marked in own]
    more = -(-len(each) // COLUMNS) * COLUMNS
    rows = torch.stack([(bias / factor).to(q.dtype) for _, bias, _ in each], -1)
    q = torch.cat((q, F.pad(rows, (0, more - len(each))).expand(*q.shape[:-1], more)), -1)
    wide = []
    for number, k in enumerate(keys):
        columns = k.new_zeros(*k.shape[:-1], more)
        for column, (of, _, marked) in enumerate(each):
            if of == number:
                columns[..., column] = 1 if marked is None else marked.to(k.dtype)
        wide.append(torch.cat((k, columns), -1))
    return q, wide, [F.pad(v, (0, more)) for v in values], factor
