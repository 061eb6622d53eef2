"""How the prompts of requests that join are read: together, after a beginning that several share, or apart."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
Beginning = tuple[object, ...]
"""Key of a conversation's part up to the end of its last clip."""
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
        self._recent: OrderedDict[Beginning, None] = OrderedDict()

    def read(self, decoding: DecodingBatch, heard: list[EncodedRequest]) -> None:
        """Read the prompts of requests and let their answers join."""
        single: list[EncodedRequest] = []
        following: dict[Beginning, list[EncodedRequest]] = {}
        for one in heard:
            begins = self._beginning(one, decoding.plain)
            if begins is None:
                single.append(one)
            else:
                following.setdefault(begins, []).append(one)
        begun: dict[Beginning, PromptsRead] = {}
        first: list[EncodedRequest] = []
        for begins, group in following.items():
            kept = self.cache.get(begins, PromptsRead)
            if kept is not None:
                begun[begins] = kept
            elif len(group) > 1 or begins in self._recent:
                first.append(group.pop(0))
            else:
                single.append(group.pop(0))
            self._remember(begins)
        for some in _apart(first, lambda one: one.keys > LONG_KEYS):
            self._guarded(partial(self._read_first, begun), decoding, some)
        # where a beginning cannot be read, each request about it gets the error of its own prompt
        single += [one for begins, group in following.items() if begins not in begun for one in group]
        in_place = not any(self.model.llm.windows)
        *alone, together = _apart(single, lambda one: in_place and (one.request.options.n > 1 or one.keys > LONG_KEYS))
        for some in alone:
            self._guarded(partial(self._read_single, True), decoding, some)
        self._guarded(partial(self._read_single, False), decoding, together)
        rests = [one for begins, group in following.items() if begins in begun for one in group]
        self.stats.prefix_hits += len(rests)
        self._guarded(partial(self._read_rests, begun), decoding, rests)

    def _guarded(
        self,
        reading: Callable[[DecodingBatch, list[EncodedRequest]], None],
        decoding: DecodingBatch,
        group: list[EncodedRequest],
    ) -> None:
        """Read a group; where that fails, each request alone, so that one does not fail the others."""
        if not group:
            return
        try:
            reading(decoding, group)
        except Exception as error:
            for one in group:
                if len(group) == 1 or one.request.usage.completion:  # its first token was sent
                    self.fail(one.request, error)
                else:
                    self._guarded(reading, decoding, [one])

    def _beginning(self, one: EncodedRequest, plain: bool) -> Beginning | None:
        """Key of a conversation's part up to the end of its last clip; None where it cannot be shared."""
        llm, ids = self.model.llm, one.conversation.ids
        if not one.conversation.clips or any(llm.windows) or not llm.shares_prefixes or ids[-1] == AUDIO:
            return None
        first = ids[: _end_of_clips(ids)]
        return ("beginning", plain, tuple(first), one.digests) if set(first) > {AUDIO} else None

    def _remember(self, begins: Beginning) -> None:
        self._recent[begins] = None
        self._recent.move_to_end(begins)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    def _read_first(
        self, begun: dict[Beginning, PromptsRead], decoding: DecodingBatch, group: list[EncodedRequest]
    ) -> None:
        """Read whole prompts, and keep their beginnings for others that begin so."""
        prompts = self._read_prompts([(one.conversation, one.clips) for one in group])
        for at, (one, greedy) in enumerate(zip(group, greedy_of(prompts.logits_BV), strict=True)):
            begins, ids = self._beginning(one, decoding.plain), one.conversation.ids
            assert begins is not None
            begun[begins] = beginning = prompts.beginning(at, len(ids) - _end_of_clips(ids))
            self.cache.put(begins, beginning)
            for choice in self.begin(one, prompts.logits_BV[at], greedy):
                decoding.batch.join_whole(prompts, at, beginning)
                decoding.choices.append(choice)

    def _read_rests(
        self, begun: dict[Beginning, PromptsRead], decoding: DecodingBatch, group: list[EncodedRequest]
    ) -> None:
        """Read what follows beginnings that were read."""
        following: dict[Beginning, list[EncodedRequest]] = {}
        for one in group:
            begins = self._beginning(one, decoding.plain)
            assert begins is not None
            following.setdefault(begins, []).append(one)
        rests = [
            [one.conversation.ids[_end_of_clips(one.conversation.ids) :] for one in each] for each in following.values()
        ]
        texts = read_after(self.model.llm, [begun[begins] for begins in following], rests)
        ordered = [one for each in following.values() for one in each]
        for at, (one, greedy) in enumerate(zip(ordered, greedy_of(texts.logits_RV), strict=True)):
            for choice in self.begin(one, texts.logits_RV[at], greedy):
                decoding.batch.join_after(texts, at)
                decoding.choices.append(choice)

    def _read_single(self, in_place: bool, decoding: DecodingBatch, group: list[EncodedRequest]) -> None:
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


def _apart(given: Sequence[EncodedRequest], alone: Callable[[EncodedRequest], bool]) -> list[list[EncodedRequest]]:
    """Groups of one for those that are read alone, and last the others, perhaps none."""
    return [*([one] for one in given if alone(one)), [one for one in given if not alone(one)]]


def _end_of_clips(ids: Sequence[int]) -> int:
    """One past the last clip."""
    return len(ids) - list(ids)[::-1].index(AUDIO)


def greedy_of(logits_RV: Tensor) -> list[int]:
    """The most likely token of each row."""
    found: list[int] = logits_RV.float().argmax(-1).tolist()
    return found
