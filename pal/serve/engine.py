"""The engine: one thread that owns a model and answers requests in one running batch.

Between two decoding steps waiting requests join and finished ones leave. Audio keys and values are kept by the digest
of the clip's bytes; beginnings of conversations, up to the end of their last clip, are kept from the second time on, so
that questions about one clip share one copy of its keys and read it once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal.answering import default_options, is_the_llm_s
from pal.backbone import adapters
from pal.backbone.audio_kv import AudioKV
from pal.backbone.running import PromptsRead, RunningBatch, read, read_after
from pal.clips import ClipFeatures
from pal.serve.choices import ChoiceState, finish
from pal.serve.lru import ByteLRU
from pal.serve.requests import (
    ClosingError,
    EngineRequest,
    Event,
    Failed,
    Indexed,
    QueueFullError,
    RequestClip,
    TooLongError,
    Usage,
)
from pal.types import AUDIO, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel

READ_IDS = 4096
"""Text tokens of the prompts that are read between two steps, so that running answers do not wait long."""
ENCODE_SECONDS = 60.0
"""Seconds of audio that are encoded between two steps."""
LONG_KEYS = 1024
"""Keys of a prompt beyond which it is attended to where it was read, since shorter ones would be padded to it."""
_RECENT = 4096
"""Beginnings of conversations that are remembered, to notice the second one."""
_LOG = logging.getLogger(__name__)


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
class _Lane:
    """Sequences that are decoded with the same weights: with the adapters or without."""

    batch: RunningBatch
    plain: bool
    choices: list[ChoiceState] = field(default_factory=list)


@dataclass(eq=False)
class _Heard:
    """A request with its clips' keys and values."""

    request: EngineRequest
    conversation: Tokens
    clips: list[AudioKV]
    most: int
    """Tokens that an answer may have."""

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self.request.clips[i].digest for i in self.conversation.clips)

    @property
    def keys(self) -> int:
        """At least as many keys as later rows see in a layer."""
        return len(self.conversation.ids) + sum(self.clips[i].tokens for i in self.conversation.clips)


class Engine:
    """Answers requests with one model, in a thread of its own.

    Args:
        name: of the model, for clients.
        model: in evaluation mode; its weights must not change.
        batch: most answers that are generated at once.
        queue: most requests that wait.
        cache_bytes: of audio keys and values and of read beginnings of conversations.
    """

    def __init__(
        self, name: str, model: PalModel, *, batch: int = 64, queue: int = 128, cache_bytes: int = 1 << 30
    ) -> None:
        self.name, self.model, self.batch, self.queue = name, model, batch, queue
        self.digest = model.digest
        self.cache = ByteLRU(cache_bytes)
        self.stats = EngineStats()
        ends = default_options(model.tokenizer, model.llm.vocab)["eos_token_id"]
        self._ends = frozenset(ends or ())
        self._waiting: deque[EngineRequest] = deque()
        self._changed = Condition()
        self._lanes = [_Lane(RunningBatch(model.llm), plain) for plain in (False, True)]
        self._recent: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._closing = False
        self._thread = Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    # For any thread

    @property
    def context(self) -> int:
        """Most positions of a conversation, its answer included."""
        return int(getattr(self.model.llm.lm.config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being generated."""
        return sum(len(lane.choices) for lane in self._lanes)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def stored(self, digest: str) -> AudioKV | None:
        """Audio keys and values of the clip with this digest, if they are in the cache."""
        return self.cache.get(("clip", digest), AudioKV)

    def submit(self, request: EngineRequest) -> None:
        """Put a request into the queue.

        Raises:
            QueueFullError: too many are waiting.
            ClosingError: after `close`.
        """
        with self._changed:
            if not self.ready:
                raise ClosingError("the server is stopping; ask another one, or again later")
            if len(self._waiting) >= self.queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting, as many as may; try again later")
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: EngineRequest) -> None:
        """Forget a request; its answers stop before the next step."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self.stats.cancelled += 1
            self._changed.notify()

    def retry_after(self) -> int:
        """Whole seconds after which there may be room in the queue."""
        recent = list(self.stats.recent_seconds) or [1.0]
        each = sum(recent) / len(recent)
        return min(60, max(1, math.ceil(each * (1 + self.waiting / max(1, self.batch)))))

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer those that are there, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    # The thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self._leave_cancelled()
                self._admit()
                for lane in self._lanes:
                    if lane.choices:
                        self._step(lane)

    def _wait(self) -> bool:
        """Wait for work; False at the end."""
        with self._changed:
            while not (self._waiting or self.running):
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _leave_cancelled(self) -> None:
        for lane in self._lanes:
            gone = [row for row, choice in enumerate(lane.choices) if choice.request.cancelled]
            self.stats.cancelled += len({id(lane.choices[row].request) for row in gone})
            self._leave(lane, gone)

    @staticmethod
    def _leave(lane: _Lane, rows: Iterable[int]) -> None:
        for row in sorted(rows, reverse=True):  # so that the row that takes the number stays
            lane.batch.leave(row)
            lane.choices[row] = lane.choices[-1]
            lane.choices.pop()

    def _take(self) -> list[EngineRequest]:
        """The next requests in the order of their arrival, as many as there is room for."""
        taken: list[EngineRequest] = []
        free, ids, seconds = self.batch - self.running, READ_IDS, ENCODE_SECONDS
        with self._changed:
            while self._waiting:
                request = self._waiting[0]
                answers = 0 if request.conversation is None else request.options.n
                ids -= 0 if request.conversation is None else len(request.conversation.ids)
                seconds -= sum(one.clip.seconds for one in request.clips if not isinstance(one.clip, AudioKV))
                if answers > free or (taken and (ids < 0 or seconds < 0)):
                    break
                free -= answers
                taken.append(self._waiting.popleft())
        return taken

    def _admit(self) -> None:
        heard: dict[bool, list[_Heard]] = {False: [], True: []}
        for request in self._take():
            if request.cancelled:
                continue
            try:
                clips = [self._keys_values(clip, request.usage) for clip in request.clips]
                if request.conversation is None:
                    request.emit(Indexed(clips[0]))
                    continue
                one = _Heard(request, request.conversation, clips, self._most(request, request.conversation, clips))
            except Exception as error:  # of this request alone
                self._fail(request, error)
                continue
            heard[is_the_llm_s(self.model, request.conversation)].append(one)
        for lane in self._lanes:
            with self._weights(lane):
                self._read_all(lane, heard[lane.plain])

    def _weights(self, lane: _Lane) -> AbstractContextManager[object]:
        return adapters.disabled(self.model.llm) if lane.plain else nullcontext()

    def _keys_values(self, given: RequestClip, usage: Usage) -> AudioKV:
        """The clip's audio keys and values, computed if the cache does not have them."""
        found = given.clip if isinstance(given.clip, AudioKV) else self.stored(given.digest)
        if found is None:
            model = self.model
            assert not isinstance(given.clip, AudioKV)
            features = model.features(model.ready([given.clip]))  # alone, so that the batch does not change it
            found = model.integration.index(features, model.llm, self.digest, [given.clip.seconds])
            self.cache.put(("clip", given.digest), found)
            self.stats.clip_misses += 1
            self.stats.audio_seconds += given.clip.seconds
        else:
            self.stats.clip_hits += 1
            usage.cached += found.tokens
        return found

    def _most(self, request: EngineRequest, conversation: Tokens, clips: Sequence[AudioKV]) -> int:
        """Tokens that an answer may have; notes the prompt's length.

        Raises:
            TooLongError: the prompt alone does not fit.
        """
        usage, placed = request.usage, [clips[i] for i in conversation.clips]
        usage.audio = sum(clip.tokens for clip in placed)
        usage.prompt = len(conversation.ids) - len(placed) + usage.audio
        streams = [stream for clip in placed for stream in clip.streams]
        positions = len(conversation.ids) - len(placed)
        positions += sum(stream.layout.groups(stream.lengths[0]) * stream.layout.span for stream in streams)
        room = self.context - positions
        if room < 1:
            raise TooLongError(
                f"the conversation takes {positions} positions and the model has {self.context}; shorten text or clips"
            )
        self.stats.prompt_tokens += usage.prompt
        return min(request.options.max_tokens, room)

    # Reading prompts

    def _read_all(self, lane: _Lane, heard: list[_Heard]) -> None:
        """Read the prompts of requests and let their answers join."""
        single: list[_Heard] = []
        following: dict[tuple[object, ...], list[_Heard]] = {}
        for one in heard:
            begins = self._beginning(one, lane.plain)
            if begins is None:
                single.append(one)
            else:
                following.setdefault(begins, []).append(one)
        shared: list[_Heard] = []
        for begins, group in following.items():
            again = len(group) > 1 or begins in self._recent or self.cache.get(begins, PromptsRead) is not None
            (shared if again else single).extend(group)
            self._remember(begins)
        self._guarded(self._read_after, lane, shared, True)
        in_place = not any(self.model.llm.windows)
        apart = [one for one in single if in_place and (one.request.options.n > 1 or one.keys > LONG_KEYS)]
        for one in apart:
            self._guarded(self._read_single, lane, [one], True)
        self._guarded(self._read_single, lane, [one for one in single if one not in apart], False)

    def _guarded(
        self, reading: Callable[[_Lane, list[_Heard], bool], None], lane: _Lane, group: list[_Heard], how: bool
    ) -> None:
        """Read a group; where that fails, each request alone, so that one does not fail the others."""
        if not group:
            return
        try:
            reading(lane, group, how)
        except Exception as error:
            for one in group:
                if len(group) == 1 or one.request.usage.completion:  # its first token was sent
                    self._fail(one.request, error)
                else:
                    self._guarded(reading, lane, [one], how)

    def _beginning(self, one: _Heard, plain: bool) -> tuple[object, ...] | None:
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

    def _read_after(self, lane: _Lane, group: list[_Heard], in_place: bool) -> None:
        """Read what follows shared beginnings, and the beginnings themselves, where the cache does not have them."""
        following: dict[tuple[object, ...], list[_Heard]] = {}
        for one in group:
            begins = self._beginning(one, lane.plain)
            assert begins is not None
            following.setdefault(begins, []).append(one)
        prompts = [self._read_beginning(begins, each[0]) for begins, each in following.items()]
        rests = [
            [one.conversation.ids[_end_of_clips(one.conversation.ids) :] for one in each] for each in following.values()
        ]
        texts = read_after(self.model.llm, prompts, rests)
        ordered = [one for each in following.values() for one in each]
        for at, (one, greedy) in enumerate(zip(ordered, _greedy(texts.logits_RV), strict=True)):
            for choice in self._begin(one, texts.logits_RV[at], greedy):
                lane.batch.join_after(texts, at)
                lane.choices.append(choice)

    def _read_beginning(self, begins: tuple[object, ...], one: _Heard) -> PromptsRead:
        prompt = self.cache.get(begins, PromptsRead)
        if prompt is None:
            first = Tokens(one.conversation.ids[: _end_of_clips(one.conversation.ids)], one.conversation.clips)
            prompt = self._read_prompts([(first, one.clips)])
            self.cache.put(begins, prompt)
        else:
            self.stats.prefix_hits += 1
        return prompt

    def _read_single(self, lane: _Lane, group: list[_Heard], in_place: bool) -> None:
        """Read whole prompts."""
        prompts = self._read_prompts([(one.conversation, one.clips) for one in group])
        for at, (one, greedy) in enumerate(zip(group, _greedy(prompts.logits_BV), strict=True)):
            for choice in self._begin(one, prompts.logits_BV[at], greedy):
                lane.batch.join(prompts, at, in_place)
                lane.choices.append(choice)

    def _read_prompts(self, given: Sequence[tuple[Tokens, list[AudioKV]]]) -> PromptsRead:
        clips: list[AudioKV] = []
        conversations = []
        for conversation, own in given:
            conversations.append(Tokens(conversation.ids, [len(clips) + i for i in conversation.clips]))
            clips += own
        model = self.model
        features = ClipFeatures(clips, [clip.seconds for clip in clips])
        return read(model.llm, model.inputs(features, conversations, model.llm.prompt_side()))

    def _begin(self, one: _Heard, logits_V: Tensor, greedy: int) -> list[ChoiceState]:
        """Choose the first token of each answer; the answers that go on."""
        request, tokenizer = one.request, self.model.tokenizer
        choices = [
            ChoiceState(request, number, one.most, self._ends, tokenizer, self.model.device)
            for number in range(request.options.n)
        ]
        for choice in choices:
            choice.advance(logits_V.float(), greedy)
        going = [choice for choice in choices if not choice.ended]
        if not going:
            self._finish(request)
        return going

    # Steps

    def _step(self, lane: _Lane) -> None:
        try:
            with self._weights(lane):
                logits_RV = lane.batch.step([choice.last for choice in lane.choices]).float()
            ended = []
            for row, (choice, greedy) in enumerate(zip(lane.choices, _greedy(logits_RV), strict=True)):
                choice.advance(logits_RV[row], greedy)
                if choice.ended:
                    ended.append(row)
            self.stats.steps += 1
            self.stats.rows += len(lane.choices)
        except Exception as error:
            failed = {id(choice.request): choice.request for choice in lane.choices}
            lane.batch, lane.choices = RunningBatch(self.model.llm), []
            for request in failed.values():
                self._fail(request, error)
            return
        requests = {id(lane.choices[row].request): lane.choices[row].request for row in ended}
        self._leave(lane, ended)
        going = {id(choice.request) for choice in lane.choices}
        for key, request in requests.items():
            if key not in going:
                self._finish(request)

    def _finish(self, request: EngineRequest) -> None:
        self.stats.answered += 1
        self.stats.recent_seconds.append(time.monotonic() - request.since)
        self.stats.completion_tokens += request.usage.completion
        finish(request)

    def _fail(self, request: EngineRequest, error: Exception) -> None:
        self.stats.failed += 1
        if not isinstance(error, ValueError):
            _LOG.error("a request failed", exc_info=error)
        event: Event = Failed(error)
        request.emit(event)


def _end_of_clips(ids: Sequence[int]) -> int:
    """One past the last clip."""
    return len(ids) - list(ids)[::-1].index(AUDIO)


def _greedy(logits_RV: Tensor) -> list[int]:
    found: list[int] = logits_RV.float().argmax(-1).tolist()
    return found
