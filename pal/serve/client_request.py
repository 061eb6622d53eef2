"""Between the event loop and an engine's thread: events of a request, and what happens if its client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from threading import Lock

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect, Request

from pal.serve.engine import Engine
from pal.serve.errors import to_api_error
from pal.serve.metrics import Metrics
from pal.serve.requests import AnswerPiece, Computed, EngineRequest, Event, Failed, Finished, Indexed


class EventInbox:
    """Events of the engines' threads on their way to an event loop; made in the loop, filled by any thread.

    Waking the loop costs a system call and interrupts the engine's thread, so the loop is woken once for all events
    that come before it looks.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = Lock()
        self._waiting: list[tuple[asyncio.Queue[Event | None], Event]] = []

    def put(self, queue: asyncio.Queue[Event | None], event: Event) -> None:
        """Put an event into a queue of the loop."""
        with self._lock:
            self._waiting.append((queue, event))
            first = len(self._waiting) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for queue, event in waiting:
            queue.put_nowait(event)


class ClientRequest:
    """A request of a client, from its arrival to its last event.

    Args:
        engine: that answers it.
        http: the client's request; when the client leaves, the engine forgets it.
        metrics: where the latencies go.
        inbox: of the event loop, for the engine's events.
    """

    def __init__(self, engine: Engine, http: Request, metrics: Metrics, inbox: EventInbox) -> None:
        self.engine, self.http, self.metrics = engine, http, metrics
        self.began = time.monotonic()
        self._inbox = inbox
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._request: EngineRequest | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ended = False

    def emit(self, event: Event) -> None:
        """Take an event from the engine's thread."""
        self._inbox.put(self._events, event)

    async def submit(self, prepare: Callable[[], EngineRequest], limiter: CapacityLimiter) -> None:
        """Prepare a request in a thread and put it into the queue.

        Raises:
            ApiError: it cannot be answered, or the queue is full.
        """
        request = await to_thread.run_sync(prepare, limiter=limiter)
        try:
            self.engine.submit(request)
        except Exception as error:
            raise to_api_error(error, self.engine.retry_after()) from None
        self._request = request
        self._watch = asyncio.create_task(self._until_disconnect())

    async def _until_disconnect(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self._events.put_nowait(None)

    def cancel(self) -> None:
        """Let the engine forget the request, unless it has ended."""
        if self._request is not None and not self._ended:
            self.engine.cancel(self._request)
            self._ended = True

    def close(self) -> None:
        """Stop watching the client; cancels what has not ended."""
        self.cancel()
        if self._watch is not None:
            self._watch.cancel()

    async def events(self) -> AsyncIterator[AnswerPiece | Finished | Indexed | Computed]:
        """Events up to the last one.

        Raises:
            ApiError: the request failed.
            ClientDisconnect: the client left.
        """
        first = True
        try:
            while True:
                event = await self._events.get()
                if event is None:
                    raise ClientDisconnect
                now = time.monotonic()
                if first and isinstance(event, AnswerPiece):
                    self.metrics.first_token.labels(self.engine.name).observe(now - self.began)
                    first = False
                if isinstance(event, Failed):
                    self._ended = True
                    raise to_api_error(event.error)
                if not isinstance(event, AnswerPiece):
                    self._ended = True
                    self.metrics.duration.labels(self.engine.name).observe(now - self.began)
                    yield event
                    return
                yield event
        finally:
            self.close()
