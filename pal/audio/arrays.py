"""Samples as arrays of any library: numpy, torch on any device, lists, torchcodec's decoder.

**Channel axis.** A clip [N] has one channel. With two axes, the channel axis is the one with at most 8 entries where
the other has more: [1, N] and [2, N] are channels first, [N, 1] and [N, 2] channels last. Other shapes are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pal.audio.limits import Limits
from pal.audio.stream_info import DecodeError

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
    """torchcodec's `AudioDecoder`, the type of a clip in `datasets` 4 and 5."""

    def get_all_samples(self) -> DecodedSamples:
        """Decode the whole clip."""


def is_array(value: object) -> bool:
    """Whether a value is an array of some library; a list is not."""
    return isinstance(value, np.ndarray | Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_decoder(value: object) -> bool:
    """Whether a value is a `SamplesDecoder` or its `DecodedSamples`."""
    return callable(getattr(value, "get_all_samples", None)) or _is_decoded(value)


def decode_all(value: Any) -> tuple[np.ndarray, int]:
    """Samples [N, channels] and rate of a `SamplesDecoder` or of its `DecodedSamples`.

    Raises:
        DecodeError: the decoder failed, or returns samples of another shape.
    """
    if callable(decoder := getattr(value, "get_all_samples", None)):
        try:
            value = decoder()
        except Exception as error:  # any error of the decoding library
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DecodeError(f"its decoder failed ({reason[:120]})", "give the path of the file") from None
    array_CN = _numpy(value.data)
    if array_CN.ndim != 2:
        raise DecodeError(f"its decoder gives samples of shape {list(array_CN.shape)}", "it must give [channels, N]")
    return array_CN.T, value.sample_rate


def read_pair(pair: tuple[Any, ...], limits: Limits) -> tuple[np.ndarray, Any]:
    """Samples [N] or [N, channels] and their rate, from a pair in either order.

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
    """Samples as an array [N] or [N, channels], from either order of axes.

    Raises:
        DecodeError: no samples, no numbers, or an ambiguous channel axis.
    """
    array = _numpy(samples)
    if array.dtype in (np.int64, np.uint64) and array.size:
        # a list of integers becomes int64, whose full scale (16 bits or 32) is unknown
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
    """Whether a value is a scalar: Python's, numpy's, or a tensor without axes."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | np.number) or (is_array(value) and len(getattr(value, "shape", (0,))) == 0)


def _numpy(samples: Any) -> np.ndarray:
    """Numpy array of an array or tensor on any device, of any float type."""
    try:
        if isinstance(samples, Tensor):
            tensor = samples.detach()
            # numpy has neither bfloat16 nor 8-bit floats
            wide = tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64)
            return tensor.to("cpu", torch.float32 if wide else tensor.dtype).resolve_neg().numpy()
        return np.asarray(samples)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:80]
        raise DecodeError(f"the samples are no array of numbers ({reason})", _PAIR) from None
