"""Collation of records into batches: each distinct clip is read once and shared by its rows."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

import pal.audio
from pal.data.manifest import Record
from pal.data.prompts import PLAIN, PromptStyle, conversation_of, encode
from pal.errors import AudioError, AudioWarning
from pal.types import Batch, EncodedClip, TagSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tags = list[TagSpan] | None
Augment = Callable[[Tensor, int, np.random.Generator, Tags], tuple[Tensor, Tags]]
"""(samples [N], rate in Hz, random generator, tags of the clip or None) -> new samples and tags."""


class WaveformCache:
    """LRU cache of decoded waveforms, limited in bytes. Pickled copies (in workers) start empty."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[WaveformCache], tuple[int]]:
        return WaveformCache, (self.max_bytes,)

    def get(self, path: str) -> Tensor | None:
        """The waveform of a path, or None; it must not be changed in place."""
        with self._lock:
            if path in self._held:
                self._held.move_to_end(path)
            return self._held.get(path)

    def put(self, path: str, samples_N: Tensor) -> None:
        """Store a waveform and evict the least recently used ones beyond the limit."""
        with self._lock:
            if samples_N.nbytes > self.max_bytes or path in self._held:
                return
            self._held[path] = samples_N
            self.bytes += samples_N.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._held.popitem(last=False)[1].nbytes


class Collator:
    """Collate function from records to a `Batch`, usable as a DataLoader's `collate_fn`.

    Args:
        tokenizer: any Hugging Face tokenizer.
        rate: Hz of the waveforms, the encoder's sampling rate.
        augment: augmentation of the clips; None for none.
        with_audio: False leaves the clips and their placeholders out.
        train: True includes the answers with labels, False ends rows with the generation prompt.
        style: system message of every conversation, and text after clips.
        encode_clip: returns encoder features of a path, used instead of its waveform; not with `augment`.
        cache_bytes: size of the cache of decoded audio, so that a small corpus is not decoded in every
            epoch. 0 for none.
        read_to_end: read clips of unknown length to the end of the file, with an `AudioWarning` each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rate: int,
        augment: Augment | None = None,
        with_audio: bool = True,
        train: bool = True,
        style: PromptStyle = PLAIN,
        encode_clip: Callable[[str], EncodedClip] | None = None,
        cache_bytes: int = 1 << 30,
        read_to_end: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.rate = rate
        self.augment = augment
        self.with_audio = with_audio
        self.train = train
        self.style = style
        self.encode_clip = encode_clip
        self.cache = WaveformCache(cache_bytes)
        self.read_to_end = read_to_end

    def __call__(
        self,
        records: Sequence[Record],
        seeds: Sequence[int] | None = None,
        bad_clips: dict[str, AudioError] | None = None,
    ) -> Batch:
        """Batch of the records, one row each.

        Args:
            records: several may share a clip.
            seeds: one a record, for `augment`. A shared clip is augmented once, with the seed of its
                first record.
            bad_clips: unusable clips and their errors. Records about them are left out, and clips of these records
                that cannot be used are added. None: an unusable clip raises its error.

        Raises:
            AudioError, PromptError: a clip or a conversation is unusable.
        """
        assert self.augment is None or seeds is not None, "augmentation needs a seed for each record"
        assert self.augment is None or self.encode_clip is None, "augmented clips cannot use cached features"
        place: dict[str, int] = {}
        waveforms: list[Tensor] = []
        encoded: list[EncodedClip] = []
        tags: list[Tags] = []
        conversations = []
        ids = []
        for number, record in enumerate(records):
            clips = record.clips if self.with_audio else ()
            sounds = self._sounds([path for path in dict.fromkeys(clips) if path not in place], bad_clips)
            if sounds is None:
                continue
            for at, path in enumerate(clips):
                if path in place:
                    continue
                place[path] = len(place)
                known = list(record.tags) if at == 0 and record.tags is not None else None
                sound = sounds[path]
                if isinstance(sound, EncodedClip):
                    encoded.append(sound)
                    tags.append(known)
                    continue
                if self.augment is not None and seeds is not None:
                    rng = np.random.default_rng([seeds[number], at])
                    sound, known = self.augment(sound.clone(), self.rate, rng, known)
                waveforms.append(sound)
                tags.append(known)
            ids.append(record.id)
            conversation = conversation_of(record, self.with_audio, with_answers=self.train, style=self.style)
            conversations.append(
                encode(self.tokenizer, conversation, [place[path] for path in clips], train=self.train)
            )
        known_tags = tags if any(known is not None for known in tags) else None
        return Batch(waveforms, conversations, ids, known_tags, encoded)

    def _sounds(
        self, paths: Sequence[str], bad_clips: dict[str, AudioError] | None
    ) -> dict[str, Tensor | EncodedClip] | None:
        """Waveform or features of each clip; None if one is in `bad_clips`, to which an unusable one is added."""
        sounds: dict[str, Tensor | EncodedClip] = {}
        for path in paths:
            if bad_clips is not None and path in bad_clips:
                return None
            try:
                sounds[path] = self._load(path) if self.encode_clip is None else self.encode_clip(path)
            except AudioError as error:
                if bad_clips is None:
                    raise
                bad_clips[path] = error
                return None
        return sounds

    def _load(self, path: str) -> Tensor:
        key = f"{path}\0to the end" if self.read_to_end else path  # another source may not want it
        samples_N = self.cache.get(key)
        if samples_N is None:
            wave = pal.audio.load(path, self.rate, read_to_end=self.read_to_end)
            if wave.note is not None:
                warnings.warn(f"{wave.name}: {wave.note}", AudioWarning, stacklevel=2)
            samples_N = wave.samples_N
            self.cache.put(key, samples_N)
        return samples_N
