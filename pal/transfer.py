"""Asynchronous copies from host to device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 16
"""Each array begins at a multiple of this many int32 (64 bytes), so that kernels find it aligned."""


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device`, from pinned memory, so that the host does not wait for the copy."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def move(arrays: Sequence[NDArray[np.generic]], device: torch.device | str) -> list[Tensor]:
    """Copy integer arrays to `device` as int32 tensors, all in one transfer.

    The tensors share memory and must not be changed in place.
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


def length_mask(lengths: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """Boolean mask [B, size] on `device`: True for the first `lengths[b]` entries of row b."""
    lengths_B = to_device(torch.tensor(lengths, dtype=torch.long), device)
    return torch.arange(size, device=device) < lengths_B[:, None]
