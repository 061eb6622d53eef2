"""`DecodeProcesses`: clips of clients are decoded in processes of their own, with limits on memory and time."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock

import numpy as np
import torch

from pal.audio import Limits, Waveform, load
from pal.audio.reading import printable
from pal.audio.stream_info import CONVERT
from pal.errors import AudioError, AudioWarning
from pal.serve.decode_worker import (
    CONTROL,
    DATA,
    DONE,
    END,
    FAILED,
    FORK,
    MEMORY,
    REFUSED,
    REPLY,
    REQUEST,
    SAMPLES,
    UNKNOWN,
    WARNING,
    receive,
    receive_frame,
    send_frame,
)

_LOG = logging.getLogger(__name__)
MEBI = 1 << 20
MEMORY_BYTES = 512 * MEBI
"""Most memory of a process beyond what it starts with, unless told otherwise."""
SECONDS = 20.0
"""Longest decoding of a clip, unless told otherwise."""
_START = 120.0
"""Seconds that the fork server has for its imports."""
_STOP = 10.0
"""Seconds that it has for its end."""
_MOST = 1 << 24
"""Most bytes of a frame that a process may send."""
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
"""Environment variables that the processes get; keys and tokens are none of their business."""


@dataclass
class DecodeStats:
    """Counters of `DecodeProcesses`."""

    clips: int = 0
    """Clips decoded or refused as usual."""
    timeouts: int = 0
    out_of_memory: int = 0
    crashes: int = 0
    starts: int = 0
    """Starts of the fork server."""


class DecodeProcesses:
    """Decodes each clip in a process of its own, forked from one that holds the decoders; for several threads.

    The fork server starts at once and in the background; where it was killed, the next clip starts it again.

    Args:
        count: most processes at once; further clips wait.
        memory: bytes that a process may take beyond those that it starts with and the file (on Linux).
        seconds: that a clip may take.
        module: whose `main` is the fork server's.
    """

    def __init__(
        self,
        count: int = 2,
        memory: int = MEMORY_BYTES,
        seconds: float = SECONDS,
        module: str = "pal.serve.decode_worker",
    ) -> None:
        assert count > 0
        self.count, self.memory, self.seconds = count, memory, seconds
        self.stats = DecodeStats()
        self._module = module
        self._slots = BoundedSemaphore(count)
        self._lock = Lock()  # of the talk with the fork server
        self._counting = Lock()
        self._closed = False
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        with self._lock:
            self._start()

    @property
    def pid(self) -> int | None:
        """Process id of the fork server; None when closed."""
        return None if self._server is None else self._server.pid

    def load(self, data: bytes, rate: int, limits: Limits, name: str) -> Waveform:
        """As `pal.audio.load` of the bytes of a file, with the same samples.

        Raises:
            AudioError: as `load`; also if decoding takes too much time or memory, or crashes.
        """
        if len(data) > limits.max_bytes:
            return load(data, rate, limits, name)  # which refuses it before it reads it
        with self._slots:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    pid = self._fork(theirs)
                failure: Exception | None = None
                try:
                    wave = self._exchange(ours, data, rate, limits, name)
                except Exception as error:
                    failure = error
                code = self._end(pid)
        if failure is None or isinstance(failure, AudioError):
            self._count("clips")
            if failure is not None:
                raise failure
            return wave
        if isinstance(failure, TimeoutError):
            self._count("timeouts")
            said = f"decoding takes more than {self.seconds:g} s; send a shorter part, or {CONVERT}"
        elif isinstance(failure, MemoryError):
            self._count("out_of_memory")
            said = f"decoding takes more than {self.memory / MEBI:g} MiB of memory; send a shorter part, or {CONVERT}"
        else:
            self._count("crashes")
            _LOG.warning("a decoder ended with %s: %s", code, failure or type(failure).__name__)
            killed = code in (-signal.SIGKILL, UNKNOWN) and isinstance(failure, EOFError | OSError)
            said = "was killed while it read" if killed else "crashed on"
            said = f"the decoder {said} this file; {'send it again, or ' if killed else ''}{CONVERT}"
        raise AudioError(f"{printable(name)}: {said}") from None

    def close(self) -> None:
        """End all processes; clips that are being decoded are lost."""
        with self._lock:
            self._closed = True
            self._stop()

    def _exchange(self, ours: socket.socket, data: bytes, rate: int, limits: Limits, name: str) -> Waveform:
        """Send a clip and take what comes back, none of which is trusted."""
        until = time.monotonic() + self.seconds
        request = {"rate": rate, "limits": asdict(limits), "name": name}
        request |= {"memory": self.memory, "seconds": self.seconds}
        ours.settimeout(self.seconds)
        send_frame(ours, REQUEST, json.dumps(request).encode())
        send_frame(ours, DATA, data)
        samples = bytearray()
        most = 4 * (int(limits.max_seconds + 1) * rate)
        while True:
            kind, content = receive_frame(ours, _MOST, until)
            if kind == SAMPLES:
                samples += content
                if len(samples) > most:
                    raise ValueError("more samples than the limits allow")
            elif kind == WARNING:
                warnings.warn(content.decode(), AudioWarning, stacklevel=4)
            elif kind == REFUSED:
                raise AudioError(content.decode())
            elif kind == MEMORY:
                raise MemoryError
            elif kind == FAILED:
                raise ValueError(content.decode())
            elif kind == DONE:
                break
            else:
                raise ValueError(f"a frame of kind {kind!r}")
        end = json.loads(content)
        seconds, note = float(end["seconds"]), end["note"]
        samples_N = torch.from_numpy(np.frombuffer(samples, np.float32))
        if not len(samples_N) or not bool(samples_N.isfinite().all()) or not 0 < seconds <= limits.max_seconds:
            raise ValueError("samples that are none")
        return Waveform(samples_N, rate, seconds, printable(name), None if note is None else str(note))

    def _count(self, name: str) -> None:
        with self._counting:
            setattr(self.stats, name, getattr(self.stats, name) + 1)

    def _fork(self, theirs: socket.socket) -> int:
        """Process id of a new process that serves a socket. Raises RuntimeError if the fork server does not start."""
        with self._lock:
            for again in (True, False):
                try:
                    pid = self._tell(FORK, 0, [theirs.fileno()])
                    break
                except (EOFError, OSError) as error:
                    self._stop()
                    if self._closed or not again:
                        said = "the decoders are closed" if self._closed else "the fork server of decoders ends"
                        raise RuntimeError(said) from error
                    self._start()
        if pid <= 0:
            raise OSError(-pid, f"no process for a decoder: {os.strerror(-pid)}")
        return pid

    def _end(self, pid: int) -> int:
        """Exit code of a process, which is ended if it has not."""
        with self._lock:
            try:
                return self._tell(END, pid, [])
            except (EOFError, OSError):  # the fork server was killed; the process ends by its own timer
                self._stop()
                return UNKNOWN

    def _tell(self, kind: bytes, pid: int, files: list[int]) -> int:
        if self._control is None:
            raise EOFError
        self._control.settimeout(_START)
        socket.send_fds(self._control, [CONTROL.pack(kind, pid)], files)
        (reply,) = REPLY.unpack(receive(self._control, REPLY.size, time.monotonic() + _START))
        return int(reply)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", f"from {self._module} import main; main()", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the server, which ends them
            )
        self._control = ours
        self.stats.starts += 1

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            try:
                self._server.wait(_STOP)  # it ends when its socket is closed
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None
