"""Where a processor's clips come from: files, arrays, and addresses where they are allowed."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from pal.audio import Limits, load
from pal.errors import AudioError

_SECONDS = 30.0
"""How long a server may take to answer, or to send the next bytes."""
_KEYS = ("audio", "path", "url")


def source_of(part: Mapping[str, Any]) -> Any:
    """What an audio part of a message holds; None where it only marks a place."""
    given = [key for key in _KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise AudioError(f"an audio part has {' and '.join(given)}; give one of {', '.join(_KEYS)}")
    return part[given[0]] if given else None


def waveform(source: Any, rate: int, source_rate: int | None, allow_urls: bool) -> Tensor:
    """A clip [N] at `rate`, whole or not at all.

    Args:
        source: what `pal.audio.load` takes; a bare array or tensor; a dict with `array` and
            `sampling_rate`; an address.
        rate: Hz of the result.
        source_rate: of a bare array; None means `rate`, as transformers has it.
        allow_urls: whether addresses are fetched.

    Raises:
        AudioError: a clip that cannot be used, or an address that is not allowed.
    """
    name = None
    if isinstance(source, Mapping):
        if source.get("array") is None or source.get("sampling_rate") is None:
            raise AudioError("a clip given as a dict needs 'array' and 'sampling_rate'")
        source = (source["array"], source["sampling_rate"])
    elif isinstance(source, np.ndarray | Tensor):
        source = (source, source_rate or rate)
    elif isinstance(source, str) and "://" in source:
        name = source
        source = _fetch(source, allow_urls)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        source = (source[0].detach().to("cpu", torch.float32).numpy(), source[1])
    return load(source, rate, name=name).samples_N


def _fetch(address: str, allowed: bool) -> bytes:
    if not allowed:
        raise AudioError(
            f"{address}: addresses are not fetched; pass allow_urls=True, or download it and give its path"
        )
    limit = Limits().max_bytes
    try:
        _check_scheme(address)
        request = urllib.request.Request(address, headers={"User-Agent": "pal-audio"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            _check_scheme(answer.url)
            data: bytes = answer.read(limit + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise AudioError(f"{address}: it cannot be fetched ({reason}); download it and give its path") from None
    if len(data) > limit:
        raise AudioError(f"{address}: it is larger than {limit} bytes; download it and split it")
    return data


def _check_scheme(address: str) -> None:
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError("only http and https are")
