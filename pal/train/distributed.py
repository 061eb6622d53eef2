"""Exchange of host numbers and texts between the processes of a run, without waiting for devices."""

from __future__ import annotations

import torch
from torch import distributed


class HostReduce:
    """Exchange of host numbers and texts over a gloo group, which needs no accelerator; a no-op with one process.

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

    def gather(self, text: str) -> list[str]:
        """The text of each process, in their order."""
        if self._group is None:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size(self._group))]
        distributed.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        distributed.all_gather(parts, torch.cat((data, data.new_zeros(longest - len(data)))), group=self._group)
        return [bytes(part[: int(size)].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]
