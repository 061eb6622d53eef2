"""What is refused before a request is read: wrong keys and bodies that are too large."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pal.serve.errors import TOO_LARGE, ApiError

PROTECTED = ("/v1/", "/metrics", "/page/api/")
"""Beginnings of the paths that need a key; health checks, documentation and the page itself do not."""


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


class BodyLimit:
    """Refuses bodies that are too large: by the length that they declare, else while they are read.

    FastAPI's `max_body_size` does the same, but answers in plain text.

    Args:
        app: the application.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.most:
            await ApiError(TOO_LARGE, 413).response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)
