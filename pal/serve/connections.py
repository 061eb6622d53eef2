"""One client's connection: how long it may take to send a request and to read an answer, and how many there may be."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from pal.serve.errors import ApiError

CONNECTIONS = 1000
"""Most connections at once; fewer where the system allows the process fewer open files."""
_OTHER_FILES = 128
"""Open files of the process that are no connections."""
HEAD = 10.0
"""Seconds in which the head of a request must arrive, from the connection or its first byte on."""
STALLED = 60.0
"""Seconds that a client may leave an answer unread."""


def most_connections() -> int:
    """How many connections fit into the open files that the process may have; raises their soft limit if needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - _OTHER_FILES))


class Connection(H11Protocol):
    """uvicorn's protocol on h11, with limits that uvicorn leaves to a proxy.

    A head that does not arrive in time, and an answer that is not read, end the connection. (Bodies have their time in
    `BodyLimit`, which can still answer.) Beyond the most connections, the one that has been sending its request for the
    longest ends, so that clients which only hold connections cannot keep others out. What is no HTTP is answered with
    an error of OpenAI's shape.
    """

    most: int | None = None
    """Most connections of the process; found at the first one."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **more: Any) -> None:
        super().__init__(config, server_state, app_state, **more)
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._sending_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._await_head()
        if Connection.most is None:
            Connection.most = most_connections()
        if len(self.connections) > Connection.most:
            sending = [one for one in self.connections if isinstance(one, Connection) and one.sending_since is not None]
            longest = min(sending, key=lambda one: one.sending_since or 0.0)  # this one is among them
            longest.transport.abort()

    @property
    def sending_since(self) -> float | None:
        """When the client began to send its request, in the event loop's time; None while it waits for an answer."""
        return (
            self._sending_since if self.cycle is None or self.cycle.response_complete or self.cycle.more_body else None
        )

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        before = self.cycle
        if self._timer is None and (before is None or before.response_complete):
            self._await_head()
        super().data_received(data)
        if self.cycle is not before and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_response_complete(self) -> None:
        """An answer has been written."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # refused, and uvicorn would read its body for ever
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._unread = self.loop.call_later(STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request of HTTP, and end the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            self.transport.close()
            return
        answer = ApiError("this is not a valid HTTP request; use a client library", 400).response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _await_head(self) -> None:
        self._sending_since = self.loop.time()
        self._timer = self.loop.call_later(HEAD, self.transport.close)
