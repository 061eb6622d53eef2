"""How the prompts of requests that join are read: together, after a beginning that several share, or apart."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pal.backbone.audio_kv import AudioKV
from pal.backbone.running import PromptsRead, RunningBatch, read, read_after
from pal.clips import ClipFeatures
from pal.serve.choices import ChoiceState
from pal.serve.lru import ByteLRU
from pal.serve.requests import EngineRequest
from pal.types import AUDIO, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel

LONG_KEYS = 1024
"""Keys of a prompt beyond which it is attended to where it was read, since shorter ones would be padded to it."""
_RECENT = 4096
"""Beginnings of conversations that are remembered, to notice the second one."""


@dataclass
class EngineStats:
    """Counters since the start."""

    steps: int = 0
    rows: int = 0
    """Sum of the batch sizes of all steps."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    audio_seconds: float = 0.0
    """Encoded; clips from the cache are not counted."""
    clip_hits: int = 0
    clip_misses: int = 0
    prefix_hits: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32))


@dataclass(eq=False)
class DecodingBatch:
    """Sequences that are decoded with the same weights: with the adapters or without."""

    batch: RunningBatch
    plain: bool
    choices: list[ChoiceState] = field(default_factory=list)


@dataclass(eq=False)
class EncodedRequest:
    """A request with its clips' keys and values."""

    request: EngineRequest
    conversation: Tokens
    clips: list[AudioKV]
    most: int
    """Tokens that an answer may have."""

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the clips, in the order of the conversation."""
        return tuple(self.request.clips[i].digest for i in self.conversation.clips)

    @property
    def keys(self) -> int:
        """At least as many keys as later rows see in a layer."""
        return len(self.conversation.ids) + sum(self.clips[i].tokens for i in self.conversation.clips)


class PromptReader:
    """Reads prompts and lets their answers join a running batch.

    Args:
        model: whose LLM reads.
        cache: of read beginnings of conversations.
        stats: to count in.
        begin: chooses the first token of each answer of a request, from its logits and the most likely token; returns
            the answers that go on.
        fail: ends a request with an error.
    """

    def __init__(
        self,
        model: PalModel,
        cache: ByteLRU,
        stats: EngineStats,
        begin: Callable[[EncodedRequest, Tensor, int], list[ChoiceState]],
        fail: Callable[[EngineRequest, Exception], None],
    ) -> None:
        self.model, self.cache, self.stats, self.begin, self.fail = model, cache, stats, begin, fail
        self._recent: OrderedDict[tuple[object, ...], None] = OrderedDict()

    def read(self, decoding: DecodingBatch, heard: list[EncodedRequest]) -> None:
        """Read the prompts of requests and let their answers join."""
        single: list[EncodedRequest] = []
        following: dict[tuple[object, ...], list[EncodedRequest]] = {}
        for one in heard:
            begins = self._beginning(one, decoding.plain)
            if begins is None:
                single.append(one)
            else:
                following.setdefault(begins, []).append(one)
        shared: list[EncodedRequest] = []
        for begins, group in following.items():
            again = len(group) > 1 or begins in self._recent or self.cache.get(begins, PromptsRead) is not None
            (shared if again else single).extend(group)
            self._remember(begins)
        self._guarded(self._read_after, decoding, shared, True)
        in_place = not any(self.model.llm.windows)
        apart = [one for one in single if in_place and (one.request.options.n > 1 or one.keys > LONG_KEYS)]
        for one in apart:
            self._guarded(self._read_single, decoding, [one], True)
        self._guarded(self._read_single, decoding, [one for one in single if one not in apart], False)

    def _guarded(
        self,
        reading: Callable[[DecodingBatch, list[EncodedRequest], bool], None],
        decoding: DecodingBatch,
        group: list[EncodedRequest],
        how: bool,
    ) -> None:
        """Read a group; where that fails, each request alone, so that one does not fail the others."""
        if not group:
            return
        try:
            reading(decoding, group, how)
        except Exception as error:
            for one in group:
                if len(group) == 1 or one.request.usage.completion:  # its first token was sent
                    self.fail(one.request, error)
                else:
                    self._guarded(reading, decoding, [one], how)

    def _beginning(self, one: EncodedRequest, plain: bool) -> tuple[object, ...] | None:
        """Key of a conversation's part up to the end of its last clip; None where it cannot be shared."""
        llm, ids = self.model.llm, one.conversation.ids
        if not one.conversation.clips or any(llm.windows) or not llm.shares_prefixes or ids[-1] == AUDIO:
            return None
        first = ids[: _end_of_clips(ids)]
        return ("beginning", plain, tuple(first), one.digests) if set(first) > {AUDIO} else None

    def _remember(self, begins: tuple[object, ...]) -> None:
        self._recent[begins] = None
        self._recent.move_to_end(begins)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    def _read_after(self, decoding: DecodingBatch, group: list[EncodedRequest], in_place: bool) -> None:
        """Read what follows shared beginnings, and the beginnings themselves, where the cache does not have them."""
        following: dict[tuple[object, ...], list[EncodedRequest]] = {}
        for one in group:
            begins = self._beginning(one, decoding.plain)
            assert begins is not None
            following.setdefault(begins, []).append(one)
        prompts = [self._read_beginning(begins, each[0]) for begins, each in following.items()]
        rests = [
            [one.conversation.ids[_end_of_clips(one.conversation.ids) :] for one in each] for each in following.values()
        ]
        texts = read_after(self.model.llm, prompts, rests)
        ordered = [one for each in following.values() for one in each]
        for at, (one, greedy) in enumerate(zip(ordered, greedy_of(texts.logits_RV), strict=True)):
            for choice in self.begin(one, texts.logits_RV[at], greedy):
                decoding.batch.join_after(texts, at)
                decoding.choices.append(choice)

    def _read_beginning(self, begins: tuple[object, ...], one: EncodedRequest) -> PromptsRead:
        prompt = self.cache.get(begins, PromptsRead)
        if prompt is None:
            first = Tokens(one.conversation.ids[: _end_of_clips(one.conversation.ids)], one.conversation.clips)
            prompt = self._read_prompts([(first, one.clips)])
            self.cache.put(begins, prompt)
        else:
            self.stats.prefix_hits += 1
        return prompt

    def _read_single(self, decoding: DecodingBatch, group: list[EncodedRequest], in_place: bool) -> None:
        """Read whole prompts."""
        prompts = self._read_prompts([(one.conversation, one.clips) for one in group])
        for at, (one, greedy) in enumerate(zip(group, greedy_of(prompts.logits_BV), strict=True)):
            for choice in self.begin(one, prompts.logits_BV[at], greedy):
                decoding.batch.join(prompts, at, in_place)
                decoding.choices.append(choice)

    def _read_prompts(self, given: Sequence[tuple[Tokens, list[AudioKV]]]) -> PromptsRead:
        clips: list[AudioKV] = []
        conversations = []
        for conversation, own in given:
            conversations.append(Tokens(conversation.ids, [len(clips) + i for i in conversation.clips]))
            clips += own
        model = self.model
        features = ClipFeatures(clips, [clip.seconds for clip in clips])
        return read(model.llm, model.inputs(features, conversations, model.llm.prompt_side()))


def _end_of_clips(ids: Sequence[int]) -> int:
    """One past the last clip."""
    return len(ids) - list(ids)[::-1].index(AUDIO)


def greedy_of(logits_RV: Tensor) -> list[int]:
    """The most likely token of each row."""
    found: list[int] = logits_RV.float().argmax(-1).tolist()
    return found
