"""Moving what was made on the host to a device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 16
"""Numbers whose bytes are a multiple of what kernels want addresses to be."""


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; the host goes on at once, since a copy from pinned memory is only queued."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def move(arrays: Sequence[NDArray[np.generic]], device: torch.device | str) -> list[Tensor]:
    """Arrays of whole numbers as int32 tensors on `device`, all in one copy.

    They share memory; none may be changed in place.
    """
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.size // _ALIGNED) * _ALIGNED
    joined = np.zeros(total, np.int32)
    for start, array in zip(starts, arrays, strict=True):
        joined[start : start + array.size] = array.ravel()
    moved = to_device(torch.tensor(joined), device)
    return [moved[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=True)]


def real_ones(lengths: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """[B, size] on `device`: True for the first `lengths[b]` of each row."""
    lengths_B = to_device(torch.tensor(lengths, dtype=torch.long), device)
    return torch.arange(size, device=device) < lengths_B[:, None]
