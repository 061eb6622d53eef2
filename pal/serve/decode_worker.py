"""The processes in which a server decodes: a fork server, and a process forked from it for each clip.

The fork server imports what decoding needs, once, and never sees a byte of a clip. It has no torch, since a process
with torch takes several times as long to fork. A forked process reads one clip from
its socket, decodes it under limits, writes frames of samples and one last frame, and ends. So a file can neither stop
the server nor change what the decoder makes of another client's file, and a crash costs a fork rather than a start.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from soundfile import LibsndfileError

from pal.audio import Limits, load_into
from pal.audio.decode import Parts
from pal.errors import AudioError, AudioWarning

CONTROL = struct.Struct("!cq")
"""What the fork server is told: `FORK` with a socket, or `END` with the process id of one of its processes."""
REPLY = struct.Struct("!q")
"""What it replies: a process id, or the exit code of the ended process (negative: its signal)."""
FORK, END = b"F", b"E"
FRAME = struct.Struct("!cQ")
"""Beginning of each frame: its kind and the bytes that follow."""
REQUEST, DATA = b"R", b"D"
SAMPLES, WARNING, DONE, REFUSED, MEMORY, FAILED = b"S", b"W", b"F", b"E", b"M", b"X"
"""Kinds: float32 samples, a warning; and the last frame: seconds and note, an AudioError, no memory, another error."""
UNKNOWN = -(1 << 16)
"""Reply about a process that is not (any more) one of the fork server's."""
_SLACK = 5.0
"""Seconds beyond its time after which a process ends itself, if nobody is left to end it."""
_PIECE = 1 << 20
"""Most samples of a frame."""
_FILES = 16
"""Most open files of a process."""
_NICE = 5
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""
_MALLOC_FAILED = 17
"""libsndfile's code of an allocation that failed (SFE_MALLOC_FAILED)."""


class DecodesInto(Protocol):
    """What a process decodes with, as `pal.audio.load_into` does."""

    def __call__(
        self, parts: Parts, source: bytes, rate: int, limits: Limits, name: str, /
    ) -> tuple[float, str, str | None]:
        """Append the samples to `parts`; returns seconds, name and note."""
        ...


def receive(connection: socket.socket, size: int, until: float | None = None) -> bytearray:
    """So many bytes of a socket; `until` is a time of `time.monotonic`.

    Raises:
        EOFError: the other side has closed it.
        TimeoutError: they did not come in time.
    """
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return data


def receive_frame(connection: socket.socket, most: int, until: float | None = None) -> tuple[bytes, bytearray]:
    """Kind and content of the next frame. Raises ValueError if it has more than `most` bytes, else as `receive`."""
    kind, size = FRAME.unpack(receive(connection, FRAME.size, until))
    if size > most:
        raise ValueError(f"a frame of {size} bytes")
    return kind, receive(connection, size, until)


def send_frame(connection: socket.socket, kind: bytes, content: bytes) -> None:
    """Write a frame."""
    connection.sendall(FRAME.pack(kind, len(content)))
    if content:  # the other side may have answered to an empty frame, and be gone
        connection.sendall(content)


class SentParts:
    """Parts of a waveform, each written to a socket as it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def append(self, part_N: np.ndarray, /) -> None:
        """Write samples, float32 [n]."""
        for start in range(0, len(part_N), _PIECE):
            send_frame(self.connection, SAMPLES, part_N[start : start + _PIECE].tobytes())


def main() -> None:
    """The fork server, on the socket whose number is the last argument."""
    with contextlib.suppress(ImportError):
        import av  # noqa: F401
    run(load_into)


def run(decode: DecodesInto) -> None:
    """A fork server whose processes decode with a function; returns when the other side of its socket is closed."""
    control = socket.socket(fileno=int(sys.argv[-1]))
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager sends it to all; the server ends this one
    gc.freeze()  # so that a collection in a forked process copies no pages
    living: set[int] = set()
    try:
        while True:
            message, files, _, _ = socket.recv_fds(control, CONTROL.size, 1)
            if len(message) < CONTROL.size:
                return
            kind, pid = CONTROL.unpack(message)
            if kind == END:
                reply = _end(pid) if pid in living else UNKNOWN
                living.discard(pid)
            else:
                reply = _fork(control, files[0], decode, prctl)
                if reply > 0:
                    living.add(reply)
            control.sendall(REPLY.pack(reply))
    except ConnectionError:
        return
    finally:
        for pid in living:
            _end(pid)


def _fork(control: socket.socket, file: int, decode: DecodesInto, prctl: Callable[[int, int], object] | None) -> int:
    """Process id of a new process; the negative error number if there can be none."""
    try:
        pid = os.fork()
    except OSError as error:
        os.close(file)
        return -(error.errno or 1)
    if pid == 0:
        try:
            control.close()
            if prctl is not None:
                prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # so that a killed fork server leaves none
            _decode_one(socket.socket(fileno=file), decode)
        finally:
            os._exit(0)
    os.close(file)
    return pid


def _end(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)  # it is waited for here alone, so the id is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _decode_one(connection: socket.socket, decode: DecodesInto) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # decoders write there of what they meet in a file
    os.close(silent)
    request = json.loads(receive(connection, FRAME.unpack(receive(connection, FRAME.size))[1]))
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _SLACK)  # its signal ends the process
    data = bytes(receive(connection, FRAME.unpack(receive(connection, FRAME.size))[1]))
    _limit(request["memory"])
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            seconds, _, note = decode(
                SentParts(connection), data, request["rate"], Limits(**request["limits"]), request["name"]
            )
        for one in warned:
            if issubclass(one.category, AudioWarning):
                send_frame(connection, WARNING, str(one.message).encode())
        kind, content = DONE, json.dumps({"seconds": seconds, "note": note}).encode()
    except MemoryError:
        kind, content = MEMORY, b""
    except AudioError as error:
        kind, content = (MEMORY, b"") if _lacked_memory(error) else (REFUSED, str(error).encode())
    except BaseException:
        kind, content = FAILED, traceback.format_exc().encode(errors="replace")[-4000:]
    send_frame(connection, kind, content)


def _limit(memory: int) -> None:
    """Bound what this process may take from now on; it can raise none of it again, except as root."""
    bounds: dict[int, int] = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: _FILES}
    held = _held()
    if held is not None:
        bounds[resource.RLIMIT_DATA] = held + memory
    for kind, most in bounds.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))
    os.nice(_NICE)


def _held() -> int | None:
    """Bytes of this process' private memory; None where the system does not say, as on macOS."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return None


def _lacked_memory(error: BaseException) -> bool:
    """True if an allocation that failed is what an error goes back to, whatever it says itself."""
    found: Any = error
    while found is not None:
        if isinstance(found, MemoryError):
            return True
        if isinstance(found, LibsndfileError) and found.code == _MALLOC_FAILED:
            return True
        found = found.__cause__ or found.__context__
    return False
