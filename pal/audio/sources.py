"""`read_clip`: a clip as users and other libraries give it, in one of many forms, becomes a waveform.

| form | |
|---|---|
| path, bytes, file object | of an audio file |
| address | http, https, file (both only where they are allowed) and data |
| `(array, rate)`, `(rate, array)` | floats in -1..1, or integers of full scale; numpy, torch on any device, lists |
| array or tensor | the same at a rate that is given beside it |
| `{"array", "sampling_rate"}` | datasets 1 to 3, transformers; also `raw` or `waveform`, and `sample_rate` |
| `{"bytes", "path"}` | datasets' undecoded audio; either may be None |
| decoder | torchcodec's `AudioDecoder`, as datasets 4 and 5 give it, and what its `get_all_samples` gives |

**Which axis is that of channels.** A clip [N] has one. Of two axes it is the one with at most 8 entries where the
other has more: [1, N] and [2, N] are channels first, [N, 1] and [N, 2] channels last. Other shapes are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pal.audio.addresses import is_address, read_address, shown
from pal.audio.declared import DecodeError
from pal.audio.decode import Limits, Waveform, load
from pal.errors import AudioError, shortened

_ARRAYS, _RATES = ("array", "raw", "waveform"), ("sampling_rate", "sample_rate")
"""Keys of a clip given as a dict."""
_LIMITS = Limits()
_PAIR = "pass (samples [N] or [N, channels], rate in Hz)"


def read_clip(
    clip: Any,
    rate: int,
    *,
    source_rate: int | None = None,
    allow_urls: bool = False,
    limits: Limits = _LIMITS,
    read_to_end: bool = False,
) -> Waveform:
    """A clip of any form at `rate`, whole or not at all.

    Args:
        clip: see above.
        rate: Hz of the result.
        source_rate: of a bare array; None means `rate`, as transformers has it.
        allow_urls: whether http, https and file addresses are followed.
        limits: what to refuse.
        read_to_end: see `load`.

    Raises:
        AudioError: one line with name, fault and remedy.
    """
    name = None
    try:
        if isinstance(clip, Mapping):
            clip, name = _of_mapping(clip)
        elif isinstance(clip, str) and is_address(clip):
            name = shown(clip)
        if isinstance(clip, str) and is_address(clip):
            clip = read_address(clip, allow_urls, limits.max_bytes)
        elif (decoded := _decoded(clip)) is not None:
            clip = decoded
        elif isinstance(clip, tuple):
            clip = _pair(clip, limits)
        elif _is_array(clip):
            clip = (_by_frames(clip, limits), source_rate or rate)
    except DecodeError as error:
        raise AudioError(f"{shortened(name or _name(clip), 140)}: {error.what}; {error.remedy}") from None
    return load(clip, rate, limits, name=name, read_to_end=read_to_end)


def is_clip(value: Any) -> bool:
    """Whether a value has one of the forms; what it holds is not looked at."""
    if isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | tuple | Mapping) or _is_array(value):
        return True
    return any(callable(getattr(value, name, None)) for name in ("read", "get_all_samples")) or _is_decoded(value)


def is_list(clips: Any) -> bool:
    """Whether a value is several clips: a list, or a column of a data set; not a tuple, which is one clip.

    Raises:
        AudioError: a list of numbers.
    """
    several = isinstance(clips, Sequence) and not isinstance(clips, str | bytes | bytearray | memoryview | tuple)
    if several and len(clips) and isinstance(clips[0], int | float | np.number):
        raise AudioError("a list of numbers is no clip; give an array, or (array, rate)")
    return several


def _of_mapping(clip: Mapping[str, Any]) -> tuple[Any, str | None]:
    """What a dict holds, and what messages call it; decoded samples go before the file that they come from."""
    path = clip.get("path")
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    name = os.fsdecode(path) if isinstance(path, str | os.PathLike) else None
    arrays = [key for key in _ARRAYS if clip.get(key) is not None]
    rates = [key for key in _RATES if clip.get(key) is not None]
    if len(arrays) == 1 and len(rates) == 1:
        return (clip[arrays[0]], clip[rates[0]]), name
    if not arrays and clip.get("bytes") is not None:
        if not isinstance(clip["bytes"], bytes | bytearray | memoryview):
            raise DecodeError(f"its 'bytes' are of type {type(clip['bytes']).__name__}", "give the bytes of a file")
        return clip["bytes"], name
    if not arrays and path is not None:
        return path, None if name is None or not is_address(name) else shown(name)
    if not arrays and ("bytes" in clip or "path" in clip):
        raise DecodeError("it holds neither bytes nor a path", "leave the record out")
    raise DecodeError("a clip given as a dict needs 'array' and 'sampling_rate'", "or give 'bytes' or 'path' of a file")


def _decoded(clip: Any) -> tuple[np.ndarray, int] | None:
    """Samples [N, channels] and rate of torchcodec's decoder or its samples [channels, N]; None for other things."""
    decoder = getattr(clip, "get_all_samples", None)
    if callable(decoder):
        try:
            clip = decoder()
        except Exception as error:  # of whatever library decodes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DecodeError(f"its decoder failed ({reason[:120]})", "give the path of the file") from None
    elif not _is_decoded(clip):
        return None
    array_CN = _numpy(clip.data)
    if array_CN.ndim != 2:
        raise DecodeError(f"its decoder gives samples of shape {list(array_CN.shape)}", "it must give [channels, N]")
    return array_CN.T, clip.sample_rate


def _is_decoded(value: Any) -> bool:
    return hasattr(value, "sample_rate") and hasattr(value, "data")


def _pair(pair: tuple[Any, ...], limits: Limits) -> tuple[Any, Any]:
    """Samples and their rate, in either order."""
    if len(pair) != 2:
        raise DecodeError("the pair is not an array and its rate", _PAIR)
    first, second = pair
    samples, rate = (second, first) if _is_number(first) and not _is_number(second) else (first, second)
    if not _is_number(rate) or _is_number(samples) or isinstance(samples, str | bytes | os.PathLike | Mapping):
        raise DecodeError("the pair is not an array and its rate", _PAIR)
    return _by_frames(samples, limits), rate


def _is_number(value: Any) -> bool:
    """Whether it is a single number: Python's, numpy's, or a tensor without axes."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | np.number) or (_is_array(value) and len(value.shape) == 0)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def _by_frames(samples: Any, limits: Limits) -> np.ndarray:
    """Samples as an array [N] or [N, channels], of either order of the axes."""
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


def _name(clip: Any) -> str:
    if isinstance(clip, str):
        return shown(clip)
    return "array" if isinstance(clip, tuple) or _is_array(clip) else "clip"
