"""Long recordings: decoded, encoded and indexed in blocks, so that memory grows by what is stored of them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pal.audio import Limits, load_into
from pal.audio import seconds as length_of
from pal.audio.urls import is_url
from pal.audio_tower import BLOCK_SECONDS
from pal.backbone.audio_kv import AudioKV
from pal.clips import LONG_SECONDS, AudioInput, Clip, clip_notes, read_clip
from pal.live import LiveAudio

if TYPE_CHECKING:
    from pal.model import PalModel

LIMITS = Limits(max_seconds=86_400.0, max_bytes=1 << 36, max_decoded_bytes=1 << 38)
"""Of recordings whose samples are never in memory together."""


def read(
    model: PalModel, audio: AudioInput, allow_urls: bool = False, read_to_end: bool = False
) -> tuple[Clip, tuple[str, ...]]:
    """`read_clip` with the notes on the clip's length; a long audio file is indexed in blocks on the way.

    That needs a model whose keys and values settle while audio arrives (`LiveAudio.settles`). Such a file may have a
    day; other clips may have an hour and 1 GiB.

    Raises:
        AudioError: as `pal.audio.load`.
    """
    made = _index_file(model, audio, read_to_end)
    if made is not None:
        return made
    clip = read_clip(audio, model.sampling_rate, allow_urls=allow_urls, read_to_end=read_to_end)
    return clip, clip_notes([clip])


def index(
    model: PalModel, audio: AudioInput, allow_urls: bool = False, read_to_end: bool = False, int8: bool = False
) -> tuple[AudioKV, tuple[str, ...]]:
    """Audio keys and values of a clip that is read as by `read`, and the notes on its length; `int8`: rounded."""
    made = _index_file(model, audio, read_to_end, int8)
    if made is not None:
        return made
    clip, notes = read(model, audio, allow_urls, read_to_end)
    whole = model.keys_values(clip)
    return whole.quantized() if int8 else whole, notes


def _index_file(
    model: PalModel, audio: AudioInput, read_to_end: bool, int8: bool = False
) -> tuple[AudioKV, tuple[str, ...]] | None:
    """A long audio file in blocks; None for another clip, and for a model that has to hear it whole."""
    if not isinstance(audio, str | os.PathLike) or (isinstance(audio, str) and is_url(audio)):
        return None
    if length_of(audio, LIMITS, read_to_end) <= LONG_SECONDS:
        return None
    with LiveAudio(model, int8=int8) as live:
        if not live.settles:
            return None
        blocks = _Blocks(live, round(BLOCK_SECONDS * model.sampling_rate))
        seconds, name, note = load_into(blocks, audio, model.sampling_rate, LIMITS, read_to_end=read_to_end)
        blocks.flush()
        made = replace(live.audio, durations=(seconds,))
    return made, () if note is None else (f"{name}: {note}",)


class _Blocks:
    """Decoded parts, gathered to blocks for a stream."""

    def __init__(self, live: LiveAudio, size: int) -> None:
        self.live, self.size = live, size
        self.waiting: list[np.ndarray] = []

    def append(self, part_N: np.ndarray) -> None:
        """Take a part."""
        self.waiting.append(part_N)
        if sum(map(len, self.waiting)) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Give what is waiting to the stream."""
        if self.waiting:
            self.live.append(torch.from_numpy(np.concatenate(self.waiting)))
        self.waiting = []
