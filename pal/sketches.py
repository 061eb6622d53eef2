"""Sketches of weights: 32 numbers by which the distance between two tensors is estimated when only one is at hand.

A sketch is the tensor's norm and `BUCKETS` sums, over every `BUCKETS`-th value each, of the values times random signs
that are the same for all tensors (the sketch of Alon, Matias and Szegedy, 1996, in buckets). The squared distance of
two sketches' sums has the squared distance of the tensors as its mean, whatever the tensors are; where the difference
is spread over many values, the estimated distance is off by 13 % (one standard deviation).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

BUCKETS = 31
"""A prime, so that the values of one row or column of a matrix are spread over all buckets."""
_SEED = 0
_BLOCK = 64 * BUCKETS * 512
"""Values that are copied at once: whole random words of 64 signs, and whole rows of buckets."""


@torch.no_grad()
def sketch(x: Tensor) -> Tensor:
    """Norm and sums of a tensor: float32 [1 + BUCKETS]."""
    words = np.random.PCG64(_SEED)  # its stream is the same in all versions of numpy
    sums_K, squares = torch.zeros(BUCKETS, dtype=torch.float64), 0.0
    for part in x.detach().flatten().split(_BLOCK):
        values_N = part.cpu().float()
        squares += float(torch.linalg.vector_norm(values_N, dtype=torch.float64)) ** 2
        raw = np.asarray(words.random_raw(-(-len(values_N) // 64)), dtype="<u8")
        bits_N = torch.from_numpy(np.unpackbits(raw.view(np.uint8), count=len(values_N)))
        signs_N = bits_N.to(torch.int32).bitwise_left_shift_(31)  # the sign is the highest bit of a float
        signed_N = signs_N.bitwise_xor_(values_N.view(torch.int32)).view(torch.float32)
        missing = -len(signed_N) % BUCKETS
        sums_K += torch.nn.functional.pad(signed_N, (0, missing)).view(-1, BUCKETS).sum(0, dtype=torch.float64)
    return torch.cat([torch.tensor([squares**0.5], dtype=torch.float64), sums_K]).float()


def sketches(tensors: Mapping[str, Tensor]) -> Tensor:
    """Sketches of tensors in the order of their sorted names: float32 [number of tensors, 1 + BUCKETS]."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    for x in tensors.values():
        if (x.data_ptr(), x.shape) not in found:  # tied weights have two names
            found[x.data_ptr(), x.shape] = sketch(x)
    rows = [found[x.data_ptr(), x.shape] for _, x in sorted(tensors.items())]
    return torch.stack(rows) if rows else torch.zeros(0, 1 + BUCKETS)


def relative_difference(of: Tensor, other: Tensor) -> float:
    """Estimated norm of the difference of two tensors divided by the first one's norm, from their sketches."""
    distance = float((of[1:].double() - other[1:].double()).norm())
    if distance == 0:
        return 0.0
    return distance / float(of[0]) if of[0] > 0 else float("inf")
