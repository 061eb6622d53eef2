"""What says that tensors are the same, whatever file or machine they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_RUN = 1000
"""Words of 8 bytes that one checksum is the sum of: checksums take a thousandth of the weights' memory."""


def digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """SHA-256 over `about` and the names, types, shapes and bytes of the tensors, in hexadecimal."""
    content = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name].detach()
        content.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        content.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def model_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's state dict, in hexadecimal; audio indexes and score files carry it."""
    content = hashlib.sha256()
    for name, x in sorted(state.items()):
        content.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        content.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


class CachedModelDigest:
    """`model_digest`, computed again only when a weight may have changed.

    Torch's version counters alone do not tell: writing through `.data` (as PEFT's merging does), through numpy, and
    the fused optimizers leave them as they were, and tensors made in inference mode have none. So the weights are also
    summed up, in one pass over memory: a tenth of the time of SHA-256 or less, and nothing but one comparison waits for
    the device. What could go unnoticed is a write past the counters that leaves the sum of every 8 kB the same.
    """

    def __init__(self) -> None:
        self._last: tuple[_Stamp, str] | None = None

    def of(self, state: Mapping[str, Tensor]) -> str:
        """The digest of a state dict."""
        stamp = _Stamp(state)
        last = self._last
        if last is None or not stamp.equals(last[0]):
            last = self._last = (stamp, model_digest(state))
        return last[1]


class _Stamp:
    """Tensors as far as can be told without hashing them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.facts = [(name, _facts(x)) for name, x in sorted(state.items())]
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, x in sorted(state.items()):
            by_device.setdefault(x.device, []).append(_checksums(x))
        self.sums = {device: torch.cat(sums) for device, sums in by_device.items()}

    def equals(self, other: _Stamp) -> bool:
        """Whether nothing changed between the two."""
        return self.facts == other.facts and all(torch.equal(x, other.sums[device]) for device, x in self.sums.items())


def _facts(x: Tensor) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.dtype, tuple(x.shape), x.stride(), x.device


@torch.no_grad()
def _checksums(x: Tensor) -> Tensor:
    """Sums, modulo 2^64, of each run of a tensor's bytes: int64 [X]."""
    bytes_N = x.detach().contiguous().flatten().view(torch.uint8)
    if bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    whole = len(bytes_N) // 8 * 8
    words_N = bytes_N[:whole].view(torch.int64)
    runs = len(words_N) // _RUN * _RUN
    parts = (words_N[:runs].view(-1, _RUN).sum(1), words_N[runs:].sum()[None], bytes_N[whole:].sum()[None])
    return torch.cat(parts)
