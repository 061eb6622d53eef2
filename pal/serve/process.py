"""The server's process: sockets and signals."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pal.errors import ConfigError
from pal.serve.connections import Connection

_LAST_WORDS = 5.0
"""Seconds that clients have to read why their answers were given up, before their connections end."""


class GracefulServer(uvicorn.Server):
    """A server that refuses new requests from the first signal on, and answers those that it has.

    Where their time is over, or a second signal comes, each that is not answered gets an error that says so.

    Args:
        config: of uvicorn, with the application.
        grace: seconds that running requests have after a signal; None waits for their end.
    """

    def __init__(self, config: uvicorn.Config, grace: float | None = None) -> None:
        super().__init__(config)
        self.grace = grace
        self.gave_up = False
        """Whether a request was not answered."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. (uvicorn's own raises it again at the end, and the process would seem to have been killed.)"""
        if self.should_exit:
            self.force_exit = self.gave_up  # the third one
            self.give_up()
        self.config.app.state.stopping = True  # type: ignore[union-attr]
        self.should_exit = True

    def give_up(self) -> None:
        """Fail what is not answered."""
        self.gave_up = self.config.app.state.give_up() or self.gave_up  # type: ignore[union-attr]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers, and end."""
        over = None
        if self.grace is not None:
            over = asyncio.get_running_loop().call_later(self.grace, self.give_up)
        await super().shutdown(sockets)
        if over is not None:
            over.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise ConfigError(f"cannot listen at {host}, port {port}: {why}; give another --port or --host") from None


def make_server(app: FastAPI, grace: float | None = None) -> GracefulServer:
    """A server for an application that `create_app` made.

    Args:
        app: the application.
        grace: seconds that running requests have after a signal; None waits for their end.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=None if grace is None else round(grace + _LAST_WORDS),
    )
    # which tells of faults in clients' forms; the clients are told
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    return GracefulServer(config, grace)
