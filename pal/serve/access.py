"""What is refused before a request is read: wrong keys, and bodies that are too large, too slow or too many."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pal.serve.errors import ApiError, too_large

PROTECTED = ("/v1/", "/metrics", "/page/api/")
"""Beginnings of the paths that need a key; health checks, documentation and the page itself do not."""

FIRST = 20.0
"""Seconds that every body has to arrive."""
RATE = 16_384
"""Bytes for which a body has a second more."""
LINGER = 2.0
"""Seconds in which the rest of a body is read that was refused."""


class BearerAuth:
    """Refuses requests without the key, before their body is read.

    Args:
        app: the application.
        key: the key; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if self._key is None or scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        same = hmac.compare_digest(token.strip(), self._key)  # in the same time wherever they differ
        if kind.lower() == b"bearer" and same:
            await self.app(scope, receive, send)
            return
        said = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        error = ApiError(said, 401, headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)


class ReadsTheRest:
    """Reads on for a moment where a request is answered before its body has arrived, and throws it away.

    A connection that is closed while its client still sends is reset, and the client would not see the answer.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not {b"content-length", b"transfer-encoding"} & {k for k, _ in scope["headers"]}:
            await self.app(scope, receive, send)
            return
        ended = False

        async def noticed() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or not message.get("more_body", False)  # also where the client has left
            return message

        async def then_read(message: Message) -> None:
            if ended or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while not ended:
                        await noticed()
            await send({"type": "http.response.body"})

        await self.app(scope, noticed, then_read)


@dataclass(eq=False)
class _Body:
    """A body that is being read."""

    taken: int = 0
    """Bytes of it so far."""
    waiting: asyncio.Timeout | None = None
    """Its time for the next bytes."""
    given_up: bool = False
    """Others need the room."""


class BodyLimit:
    """Refuses bodies that are too large, too slow, or too many at once; the first by the length that they declare.

    Where all bodies together are too many bytes, the largest that has not arrived yet is refused, so that slow uploads
    cannot keep small requests out. FastAPI's `max_body_size` limits one body, too, but answers in plain text.

    Args:
        app: the application.
        most: bytes of a body.
        at_once: bytes of all bodies whose requests are not answered yet.
    """

    def __init__(self, app: ASGIApp, most: int, at_once: int) -> None:
        self.app, self.most, self.at_once = app, most, max(most, at_once)
        self._held = 0
        self._arriving: set[_Body] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.most:
            await ApiError(too_large(self.most), 413).response()(scope, receive, send)
            return
        body, began = _Body(), asyncio.get_running_loop().time()

        async def counted() -> Message:
            if body not in self._arriving:
                return await receive()  # which waits until the client leaves
            if body.given_up:
                raise HTTPException(503)
            try:
                async with asyncio.timeout_at(began + FIRST + body.taken / RATE) as body.waiting:
                    message = await receive()
            except TimeoutError:
                raise HTTPException(503 if body.given_up else 408) from None
            finally:
                body.waiting = None
            size = len(message.get("body", b""))
            body.taken += size
            self._held += size
            if body.taken > self.most:
                raise HTTPException(413, too_large(self.most))
            if self._held > self.at_once:
                self._make_room(body)
            if not message.get("more_body", False):
                self._arriving.discard(body)
            return message

        self._arriving.add(body)
        try:
            await self.app(scope, counted, send)
        finally:
            self._arriving.discard(body)
            self._held -= body.taken

    def _make_room(self, newest: _Body) -> None:
        """Give up the largest body that is arriving. Raises HTTPException where that is the newest."""
        largest = max((one for one in self._arriving if not one.given_up), key=lambda one: one.taken)
        largest.given_up = True
        if largest is newest:
            raise HTTPException(503)
        if largest.waiting is not None:
            largest.waiting.reschedule(0)
