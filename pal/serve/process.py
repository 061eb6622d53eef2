"""The server's process: sockets and signals."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pal.serve.connections import Connection


class GracefulServer(uvicorn.Server):
    """A server that refuses new requests from the first signal on, and answers those that it has."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: stop, or at the second one stop at once."""
        self.config.app.state.stopping = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


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
        timeout_graceful_shutdown=None if grace is None else max(1, round(grace)),
    )
    return GracefulServer(config)
