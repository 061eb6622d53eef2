"""Tensors of a checkpoint: parts that processes write, in safetensors, and parts that others read.

A sharded tensor is cut by rows, its first dimension, and each process writes those it holds. The header of a file says
where its parts begin, as torch's `HuggingFaceStorageWriter` writes it, so `torch.distributed.checkpoint` reads these
files, too. That writer itself is not used: it sends its plans between processes as pickles, takes no copy on the host
of a tensor that is sharded over GPUs, and holds a second copy of all that it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHARDING = "DCP_SHARDING_INFO"
"""Entry of a file's header: tensor name -> `_OFFSETS`, the place of its first element in the whole tensor."""
_OFFSETS = "saved_offsets"


@dataclass(frozen=True)
class Shard:
    """Rows of a tensor that one process holds."""

    rows: Tensor
    first: int
    """Index of the first of them in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


def rows_of(length: int, part: int, parts: int) -> tuple[int, int]:
    """First row of one of several parts of a tensor, and one past its last, as `torch.chunk` cuts and FSDP shards."""
    each = -(-length // parts)
    return min(part * each, length), min((part + 1) * each, length)


def write(tensors: Mapping[str, Tensor | Shard], path: Path) -> None:
    """Write tensors and shards to a file; a shard without rows is left out."""
    plain: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, found in tensors.items():
        tensor = found.rows if isinstance(found, Shard) else found
        if isinstance(found, Shard) and not len(tensor):
            continue
        plain[name] = tensor.detach().cpu().contiguous()
        first = found.first if isinstance(found, Shard) else 0
        offsets[name] = {_OFFSETS: [first, *[0] * (tensor.ndim - 1)] if tensor.ndim else []}
    sharded = any(isinstance(found, Shard) for found in tensors.values())
    save_file(plain, path, metadata={"format": "pt", **({_SHARDING: json.dumps(offsets)} if sharded else {})})


@dataclass(frozen=True)
class _Piece:
    path: Path
    first: int
    rows: int
    """1 for a number, which has no rows."""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in files of `write`, read when asked for, whole or some of their rows.

    Raises:
        SafetensorError: a file is none of safetensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        self._files: dict[Path, Any] = {}
        for path in paths:
            file = self._files[path] = safe_open(path, framework="pt")
            offsets = json.loads((file.metadata() or {}).get(_SHARDING, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                shape = file.get_slice(name).get_shape()
                first = (offsets.get(name, {}).get(_OFFSETS) or [0])[0]
                self._pieces.setdefault(name, []).append(_Piece(path, first, shape[0] if shape else 1))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.first)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        pieces = [self._files[piece.path].get_tensor(name) for piece in self._pieces[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def close(self) -> None:
        """Close the files; nothing can be read any more."""
        self._files.clear()

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows from `first` up to, not including, `end`; nothing else is read."""
        found: list[Tensor] = []
        for piece in self._pieces[name]:
            a, b = max(first, piece.first), min(end, piece.first + piece.rows)
            if a < b or not found:
                b = max(a, b)
                part = self._files[piece.path].get_slice(name)
                found.append(part[min(a - piece.first, piece.rows) : min(b - piece.first, piece.rows)])
        return torch.cat(found)
