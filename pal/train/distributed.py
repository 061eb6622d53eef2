"""All-reduce of host numbers between the processes of a run, without waiting for devices."""

from __future__ import annotations

import torch
from torch import distributed


class HostReduce:
    """All-reduce of host numbers over a gloo group, which needs no accelerator; a no-op with one process.

    Args:
        processes: number of processes; each must create this object and make the same calls.
    """

    def __init__(self, processes: int) -> None:
        self._group = distributed.new_group(backend="gloo") if processes > 1 else None

    def sum(self, *numbers: float) -> list[float]:
        """Sum of each number over the processes."""
        if self._group is None:
            return [float(number) for number in numbers]
        values = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(values, group=self._group)
        summed: list[float] = values.tolist()
        return summed
