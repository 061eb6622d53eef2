"""Moving what the host made to a device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; the host goes on at once, since a copy from pinned memory is only queued."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def real_ones(lengths: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """[B, size] on `device`: True for the first `lengths[b]` of each row."""
    lengths_B = to_device(torch.tensor(lengths, dtype=torch.long), device)
    return torch.arange(size, device=device) < lengths_B[:, None]
