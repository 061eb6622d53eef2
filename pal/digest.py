"""Digests of weights: equal for equal tensors, whatever file or machine they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1000
"""Words of 8 bytes in one checksum, so that checksums take a thousandth of the weights' memory."""


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

    Torch's version counters miss some changes: writes through `.data` (as in PEFT's merging) or numpy, and steps of
    fused optimizers; tensors made in inference mode have no counter. So the weights are also summed in blocks of 8 kB,
    which takes at most a tenth of the time of SHA-256 and waits for the device only once, to compare the sums. A change
    is missed only if no counter and no sum changes.
    """

    def __init__(self) -> None:
        self._last: tuple[_Fingerprint, str] | None = None

    def of(self, state: Mapping[str, Tensor]) -> str:
        """The digest of a state dict."""
        fingerprint = _Fingerprint(state)
        last = self._last
        if last is None or not fingerprint.equals(last[0]):
            last = self._last = (fingerprint, model_digest(state))
        return last[1]


class _Fingerprint:
    """Metadata and checksums of tensors, which show most changes without hashing."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.facts = [(name, _facts(x)) for name, x in sorted(state.items())]
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, x in sorted(state.items()):
            by_device.setdefault(x.device, []).append(_checksums(x))
        self.sums = {device: torch.cat(sums) for device, sums in by_device.items()}

    def equals(self, other: _Fingerprint) -> bool:
        """Whether no tensor seems to have changed between the two."""
        return self.facts == other.facts and all(torch.equal(x, other.sums[device]) for device, x in self.sums.items())


def _facts(x: Tensor) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.dtype, tuple(x.shape), x.stride(), x.device


@torch.no_grad()
def _checksums(x: Tensor) -> Tensor:
    """Sum modulo 2^64 of each block of a tensor's bytes: int64 [X]."""
    bytes_N = x.detach().contiguous().flatten().view(torch.uint8)
    if bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    whole = len(bytes_N) // 8 * 8
    words_N = bytes_N[:whole].view(torch.int64)
    in_blocks = len(words_N) // _BLOCK * _BLOCK
    parts = (words_N[:in_blocks].view(-1, _BLOCK).sum(1), words_N[in_blocks:].sum()[None], bytes_N[whole:].sum()[None])
    return torch.cat(parts)
