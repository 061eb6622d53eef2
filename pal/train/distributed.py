"""All-reduce of host numbers between the processes of a run, without waiting for devices."""

from __future__ import annotations

import torch
from torch import distributed


class HostReduce:
    """Sums over all processes of numbers that each of them knows on its host.

    With one process nothing is exchanged. Several use a group of their own that needs no accelerator (gloo).

    Args:
        processes: how many there are; all of them make this object, and call it alike.
    """

    def __init__(self, processes: int) -> None:
        self._group = distributed.new_group(backend="gloo") if processes > 1 else None

    def sum(self, *numbers: float) -> list[float]:
        """Each of the numbers, added up over the processes."""
        if self._group is None:
            return [float(number) for number in numbers]
        told = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(told, group=self._group)
        summed: list[float] = told.tolist()
        return summed
