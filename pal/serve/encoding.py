"""The clips of requests that join: those that wait together are encoded in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pal.backbone.audio_kv import AudioKV
from pal.clips import LONG_SECONDS, Waveform
from pal.serve.lru import ByteLRU
from pal.serve.reading import EngineStats
from pal.serve.requests import EngineRequest, RequestClip, Usage

if TYPE_CHECKING:
    from pal.model import PalModel

TOGETHER = 16
"""Most clips of a batch; a larger one takes more memory and is no faster."""
_ALIKE = 2.0
"""Clips of a batch differ in length by this factor at most, since shorter ones are padded to the longest."""


class ClipEncoder:
    """Computes the audio keys and values of clips that the cache does not have.

    Args:
        model: in evaluation mode.
        digest: of the model.
        cache: of audio keys and values.
        stats: to count in.
    """

    def __init__(self, model: PalModel, digest: str, cache: ByteLRU, stats: EngineStats) -> None:
        self.model, self.digest, self.cache, self.stats = model, digest, cache, stats

    def stored(self, digest: str) -> AudioKV | None:
        """Keys and values of the clip with this digest, if they are in the cache."""
        return self.cache.get(("clip", digest), AudioKV)

    def of(self, requests: Iterable[EngineRequest]) -> EncodedClips:
        """Keys and values of all clips of some requests."""
        found: dict[str, AudioKV | Exception] = {}
        waiting: dict[str, Waveform] = {}
        for given in (clip for request in requests for clip in request.clips):
            if isinstance(given.clip, Waveform) and given.digest not in found:
                stored = self.stored(given.digest)
                if stored is None:
                    waiting[given.digest] = given.clip
                else:
                    found[given.digest] = stored
        for group in _batches(waiting):
            found |= self._encoded(group)
        return EncodedClips(found, set(waiting), self.stats)

    def _encoded(self, clips: dict[str, Waveform]) -> dict[str, AudioKV | Exception]:
        """Clips of similar length in one batch; where that fails, each alone, so that one does not fail the others."""
        model, seconds = self.model, [clip.seconds for clip in clips.values()]
        try:
            features = model.features(model.ready(list(clips.values())))
            made = model.integration.index(features, model.llm, self.digest, seconds)
        except Exception as error:
            if len(clips) > 1:
                return {k: x for digest, clip in clips.items() for k, x in self._encoded({digest: clip}).items()}
            return dict.fromkeys(clips, error)
        found: dict[str, AudioKV | Exception] = {}
        for at, digest in enumerate(clips):
            found[digest] = one = made[at].copy() if len(clips) > 1 else made
            self.cache.put(("clip", digest), one)
        self.stats.clip_misses += len(clips)
        self.stats.audio_seconds += sum(seconds)
        return found


class EncodedClips:
    """Keys and values of the clips of requests that join together, also where the cache is too small for them.

    Args:
        found: by digest; an error for what cannot be encoded.
        new: digests of the clips that were not in the cache.
        stats: to count in.
    """

    def __init__(self, found: dict[str, AudioKV | Exception], new: set[str], stats: EngineStats) -> None:
        self._found, self._new, self._stats = found, new, stats

    def take(self, clips: Sequence[RequestClip], usage: Usage) -> list[AudioKV]:
        """Those of one request; counts what was in the cache, or was encoded for a request before it.

        Raises:
            Exception: what encoding a clip raised.
        """
        return [self._take(clip, usage) for clip in clips]

    def _take(self, given: RequestClip, usage: Usage) -> AudioKV:
        found = given.clip if isinstance(given.clip, AudioKV) else self._found[given.digest]
        if isinstance(found, Exception):
            raise found
        if given.digest in self._new:
            self._new.remove(given.digest)
        else:
            self._stats.clip_hits += 1
            usage.cached += found.tokens
        return found


def _batches(clips: dict[str, Waveform]) -> Iterator[dict[str, Waveform]]:
    """Clips in batches of similar length; those that are encoded in blocks are alone."""
    batch: dict[str, Waveform] = {}
    for digest, clip in sorted(clips.items(), key=lambda one: one[1].seconds):
        shortest = next(iter(batch.values())).seconds if batch else clip.seconds
        if len(batch) == TOGETHER or clip.seconds > LONG_SECONDS or clip.seconds > _ALIKE * shortest:
            if batch:
                yield batch
            batch = {}
        batch[digest] = clip
    if batch:
        yield batch
