"""The engine: one thread that owns a model and answers requests in one running batch.

Between two decoding steps waiting requests join and finished ones leave. Audio keys and values are kept by the digest
of the clip's bytes; beginnings of conversations, up to the end of their last clip, are kept from the second time on, so
that questions about one clip share one copy of its keys and read it once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Condition, Thread
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal import memory
from pal.answering import default_options, is_the_llm_s
from pal.backbone import adapters
from pal.backbone.audio_kv import AudioKV
from pal.backbone.running import RunningBatch
from pal.serve.choices import ChoiceState, finish
from pal.serve.encoding import ClipEncoder
from pal.serve.lru import ByteLRU
from pal.serve.reading import DecodingBatch, EncodedRequest, EngineStats, PromptReader, greedy_of
from pal.serve.requests import (
    ClosingError,
    Computed,
    EngineRequest,
    Event,
    Failed,
    Indexed,
    QueueFullError,
    TooLongError,
)
from pal.types import Tokens

if TYPE_CHECKING:
    from pal.model import PalModel

READ_IDS = 4096
"""Text tokens of the prompts that are read between two steps, so that running answers do not wait long."""
GIVE_BACK_SECONDS = 60.0
"""Fewest seconds between two times that freed memory is given back (see `pal.memory.FreedMemory`)."""
READ_SECONDS = 0.5
"""Seconds that reading prompts should take between two steps, so that of many requests the first are answered early."""
READ_REQUESTS = 16
"""Requests whose prompts are read together also where that takes longer, since a forward of few rows is inefficient."""
ENCODE_SECONDS = 60.0
"""Seconds of audio that are encoded between two steps."""
_LOG = logging.getLogger(__name__)


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
        self._decoding = [DecodingBatch(RunningBatch(model.llm), plain) for plain in (False, True)]
        self._reader = PromptReader(model, self.cache, self.stats, self._begin, self._fail)
        self._encoder = ClipEncoder(model, self.digest, self.cache, self.stats)
        self._seconds_per_id = 0.0
        """Of the prompts that were read last."""
        self._closing = self._giving_up = False
        self._gave_back = time.monotonic()
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
        return sum(len(decoding.choices) for decoding in self._decoding)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def stored(self, digest: str) -> AudioKV | None:
        """Audio keys and values of the clip with this digest, if they are in the cache."""
        return self._encoder.stored(digest)

    def keep(self, digest: str, audio: AudioKV) -> None:
        """Keep audio keys and values of the clip with this digest, which this model computed elsewhere."""
        audio.check(self.digest)
        self.cache.put(("clip", digest), audio)

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

    def give_up(self) -> int:
        """Take no more requests, and fail those that are there; returns their number."""
        with self._changed:
            self._closing = self._giving_up = True
            self._changed.notify()
            running = {id(choice.request) for decoding in self._decoding for choice in decoding.choices}
            return len(running) + self.waiting

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
                taken: list[EngineRequest] = []
                try:
                    self._leave_cancelled()
                    if self._giving_up:
                        taken = self._take_all()
                        raise ClosingError("the server stops before this is answered; ask another one, or again later")
                    taken = self._take()
                    self._admit(taken)
                    for decoding in self._decoding:
                        if decoding.choices:
                            self._step(decoding)
                except Exception as error:  # the thread goes on with later requests
                    self._fail_all(taken, error)
                self._give_back()

    def _give_back(self) -> None:
        """Give freed memory back from time to time, while nothing is asked."""
        if not (self._waiting or self.running) and time.monotonic() - self._gave_back > GIVE_BACK_SECONDS:
            memory.give_back_freed_memory(collect=False)
            self._gave_back = time.monotonic()

    def _fail_all(self, taken: Sequence[EngineRequest], error: Exception) -> None:
        """End all requests but the waiting ones with an error."""
        running = [choice.request for decoding in self._decoding for choice in decoding.choices]
        self._decoding = [DecodingBatch(RunningBatch(self.model.llm), plain) for plain in (False, True)]
        for request in {id(one): one for one in (*taken, *running)}.values():
            self._fail(request, error)

    def _wait(self) -> bool:
        """Wait for work; False at the end."""
        with self._changed:
            while not (self._waiting or self.running):
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _leave_cancelled(self) -> None:
        for decoding in self._decoding:
            gone = [row for row, choice in enumerate(decoding.choices) if choice.request.cancelled]
            self.stats.cancelled += len({id(decoding.choices[row].request) for row in gone})
            self._leave(decoding, gone)

    @staticmethod
    def _leave(decoding: DecodingBatch, rows: Iterable[int]) -> None:
        for row in sorted(rows, reverse=True):  # so that the row that takes the number stays
            decoding.batch.leave(row)
            decoding.choices[row] = decoding.choices[-1]
            decoding.choices.pop()

    def _take_all(self) -> list[EngineRequest]:
        with self._changed:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

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
                slow = (READ_IDS - ids) * self._seconds_per_id > READ_SECONDS and len(taken) >= READ_REQUESTS
                if answers > free or (taken and (ids < 0 or seconds < 0 or slow)):
                    break
                free -= answers
                taken.append(self._waiting.popleft())
        return taken

    def _admit(self, taken: Sequence[EngineRequest]) -> None:
        heard: dict[bool, list[EncodedRequest]] = {False: [], True: []}
        wanted = [request for request in taken if not request.cancelled]
        encoded = self._encoder.of(wanted)
        for request in wanted:
            try:
                clips = encoded.take(request.clips, request.usage)
                if request.function is not None:
                    request.emit(Computed(request.function(clips)))
                    continue
                if request.conversation is None:
                    request.emit(Indexed(clips[0]))
                    continue
                one = EncodedRequest(
                    request, request.conversation, clips, self._most(request, request.conversation, clips)
                )
            except Exception as error:  # of this request alone
                self._fail(request, error)
                continue
            heard[is_the_llm_s(self.model, request.conversation)].append(one)
        for decoding in self._decoding:
            if heard[decoding.plain]:
                began = time.monotonic()
                with self._weights(decoding):
                    self._reader.read(decoding, heard[decoding.plain])
                ids = sum(len(one.conversation.ids) for one in heard[decoding.plain])
                self._seconds_per_id = (time.monotonic() - began) / ids

    def _weights(self, decoding: DecodingBatch) -> AbstractContextManager[object]:
        return adapters.disabled(self.model.llm) if decoding.plain else nullcontext()

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
        positions += sum(stream.layout.reserved(stream.lengths[0]) for stream in streams)
        room = self.context - positions
        if room < 1:
            raise TooLongError(
                f"the conversation takes {positions} positions and the model has {self.context}; shorten text or clips"
            )
        self.stats.prompt_tokens += usage.prompt
        return min(request.options.max_tokens, room)

    # Answers

    def _begin(self, one: EncodedRequest, logits_V: Tensor, greedy: int) -> list[ChoiceState]:
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

    def _step(self, decoding: DecodingBatch) -> None:
        with self._weights(decoding):
            logits_RV = decoding.batch.step([choice.last for choice in decoding.choices]).float()
        ended = []
        for row, (choice, greedy) in enumerate(zip(decoding.choices, greedy_of(logits_RV), strict=True)):
            choice.advance(logits_RV[row], greedy)
            if choice.ended:
                ended.append(row)
        self.stats.steps += 1
        self.stats.rows += len(decoding.choices)
        requests = {id(decoding.choices[row].request): decoding.choices[row].request for row in ended}
        self._leave(decoding, ended)
        going = {id(choice.request) for choice in decoding.choices}
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
