"""What the processes of a run tell one another on the host, without waiting for devices and without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from pal.errors import PalError

_DIGEST = 32
"""Bytes of a SHA-256."""


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


class Writers:
    """Processes that write a checkpoint together; each makes the same calls, in any one thread.

    Args:
        rank: number of this one.
        count: number of writers.
        group: gloo group of them all, used for nothing else; None for a single one.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    @classmethod
    def of_all(cls, rank: int, count: int) -> Writers:
        """All processes of the run; each must call this."""
        return cls(rank, count, distributed.new_group(backend="gloo") if count > 1 else None)

    @property
    def is_first(self) -> bool:
        """True for the one that writes what there is once."""
        return self.rank == 0

    def file(self, kind: str, writer: int | None = None) -> str:
        """Name of the file with the tensors of a kind, of a writer; None: of this one."""
        number = (self.rank if writer is None else writer) + 1
        return f"{kind}.safetensors" if self.count == 1 else f"{kind}-{number:05}-of-{self.count:05}.safetensors"

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all run; none goes on before all are through, and if one fails, all do.

        Raises:
            PalError: another one failed.
        """
        try:
            yield
        except BaseException:
            self._failures(1)
            raise
        if failed := self._failures(0):
            raise PalError(f"{failed} of {self.count} processes could not write the checkpoint; their messages say why")

    def gather(self, digest: str | None) -> list[str | None]:
        """The SHA-256 that each gives, in hexadecimal, or None."""
        if self._group is None:
            return [digest]
        own = torch.zeros(1 + _DIGEST, dtype=torch.uint8)
        if digest is not None:
            own = torch.tensor([1, *bytes.fromhex(digest)], dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(found, own, group=self._group)
        return [bytes(one[1:].tolist()).hex() if one[0] else None for one in found]

    def _failures(self, own: int) -> int:
        if self._group is None:
            return own
        failed = torch.tensor(own)
        distributed.all_reduce(failed, group=self._group)
        return int(failed)


ALONE = Writers()
"""One process."""
