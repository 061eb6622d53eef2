"""Samples as arrays of any library: numpy, torch on any device, lists, torchcodec's decoder.

**Which axis is that of channels.** A clip [N] has one. Of two axes it is the one with at most 8 entries where the
other has more: [1, N] and [2, N] are channels first, [N, 1] and [N, 2] channels last. Other shapes are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pal.audio.declared import DecodeError
from pal.audio.limits import Limits

_PAIR = "pass (samples [N] or [N, channels], rate in Hz)"

Array = np.ndarray | Tensor | Sequence[float] | Sequence[Sequence[float]]
"""Samples [N], [N, channels] or [channels, N]: floats in -1..1, or integers of full scale."""


class DecodedSamples(Protocol):
    """torchcodec's `AudioSamples`."""

    @property
    def data(self) -> Tensor:
        """Samples [channels, N]."""

    @property
    def sample_rate(self) -> int:
        """Hz."""


class SamplesDecoder(Protocol):
    """torchcodec's `AudioDecoder`, which `datasets` 4 and 5 give for a clip."""

    def get_all_samples(self) -> DecodedSamples:
        """Decode the whole clip."""


def is_array(value: object) -> bool:
    """Whether a value is an array of some library; lists are none."""
    return isinstance(value, np.ndarray | Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_decoder(value: object) -> bool:
    """Whether a value is a `SamplesDecoder` or what one gives."""
    return callable(getattr(value, "get_all_samples", None)) or _is_decoded(value)


def decode_all(value: Any) -> tuple[np.ndarray, int]:
    """Samples [N, channels] and rate of a `SamplesDecoder`, or of what one gave.

    Raises:
        DecodeError: the decoder failed, or gives samples of another shape.
    """
    if callable(decoder := getattr(value, "get_all_samples", None)):
        try:
            value = decoder()
        except Exception as error:  # of whatever library decodes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DecodeError(f"its decoder failed ({reason[:120]})", "give the path of the file") from None
    array_CN = _numpy(value.data)
    if array_CN.ndim != 2:
        raise DecodeError(f"its decoder gives samples of shape {list(array_CN.shape)}", "it must give [channels, N]")
    return array_CN.T, value.sample_rate


def read_pair(pair: tuple[Any, ...], limits: Limits) -> tuple[np.ndarray, Any]:
    """Samples [N] or [N, channels] and their rate, given in either order.

    Raises:
        DecodeError: the pair is not an array and a number.
    """
    if len(pair) != 2:
        raise DecodeError("the pair is not an array and its rate", _PAIR)
    first, second = pair
    samples, rate = (second, first) if _is_number(first) and not _is_number(second) else (first, second)
    if not _is_number(rate) or _is_number(samples) or isinstance(samples, str | bytes | os.PathLike | Mapping):
        raise DecodeError("the pair is not an array and its rate", _PAIR)
    return channels_last(samples, limits), rate


def channels_last(samples: Any, limits: Limits) -> np.ndarray:
    """Samples as an array [N] or [N, channels], whichever axis was that of channels.

    Raises:
        DecodeError: no samples, no numbers, or axes that do not say which one is that of channels.
    """
    array = _numpy(samples)
    if array.dtype in (np.int64, np.uint64) and array.size:
        # what lists of integers become: of 16 bits or of 32, nobody can tell
        raise DecodeError("integers of 64 bits have no full scale", "pass floats in -1..1, or an array of int16")
    if array.size == 0:
        raise DecodeError("it holds no samples", "record or export it again")
    if array.ndim != 2:
        return array
    first, last = (size <= limits.max_channels for size in array.shape)
    if first == last:
        which = "each" if first else "none"
        fault = f"of the axes of shape {list(array.shape)} {which} could be 1 to {limits.max_channels} channels"
        raise DecodeError(fault, "pass samples [N] of one channel")
    return array.T if first else array


def _is_decoded(value: object) -> bool:
    return hasattr(value, "sample_rate") and hasattr(value, "data")


def _is_number(value: object) -> bool:
    """Whether it is a single number: Python's, numpy's, or a tensor without axes."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | np.number) or (is_array(value) and len(getattr(value, "shape", (0,))) == 0)


def _numpy(samples: Any) -> np.ndarray:
    """A numpy array of what is one, on whatever device and of whatever type of floats."""
    try:
        if isinstance(samples, Tensor):
            tensor = samples.detach()
            # numpy knows neither bfloat16 nor the floats of 8 bits
            wide = tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64)
            return tensor.to("cpu", torch.float32 if wide else tensor.dtype).resolve_neg().numpy()
        return np.asarray(samples)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:80]
        raise DecodeError(f"the samples are no array of numbers ({reason})", _PAIR) from None
