"""Processes that read, decode, augment and tokenise batches, for machines where threads do not scale.

A process gets the groups of a step and gives its micro-batches. It keeps no state that a batch depends on, so one that
ends (killed, out of memory, a crash of a decoder) is started again and is given the same step again: no batch is lost,
repeated or reordered. What needs the model's device, `Objective.prepare`, runs in the training process.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock
from typing import Protocol

import torch

import pal.errors
from pal.data.collate import WaveformCache
from pal.errors import PalError
from pal.train.objectives import MicroBatch
from pal.train.sampler import Group

logger = logging.getLogger(__name__)

_TRIES = 5
"""Times that a step is given to a process before the run ends."""
_PATIENCE = 5.0
"""Seconds that a process has for its end."""
_STARTING = Lock()

Request = tuple[Sequence[Group], bool]
"""Groups of a micro-batch, and whether it counts."""


class LoaderError(PalError):
    """A loader process that ends again and again, or fails by a programming error."""


class LoadsGroups(Protocol):
    """What a process is given to load micro-batches with; it is copied into the process."""

    waveforms: WaveformCache

    def __call__(self, groups: Sequence[Group], counts: bool) -> MicroBatch:
        """The micro-batch of some groups, before `Objective.prepare`."""
        ...


class LoaderProcesses:
    """Pool of loader processes, started when they are first needed.

    Args:
        loader: copied into each process.
        count: number of processes.
    """

    def __init__(self, loader: LoadsGroups, count: int) -> None:
        self._processes = [LoaderProcess(loader, count) for _ in range(count)]
        self._idle: SimpleQueue[LoaderProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def __call__(self, step: int, requests: Sequence[Request]) -> list[MicroBatch]:
        """Load the micro-batches of a step in an idle process; waits for one if there is none.

        Raises:
            PalError: as in the training process, with the same message.
            LoaderError: the process ends again and again.
        """
        process = self._idle.get()
        try:
            return process.load(step, requests)
        finally:
            self._idle.put(process)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run."""
        return [process.pid for process in self._processes if process.pid is not None]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close()


class LoaderProcess:
    """One loader process, started again when it has ended.

    Args:
        loader: copied into the process.
        count: number of processes that share the memory of the cache of waveforms.
    """

    def __init__(self, loader: LoadsGroups, count: int) -> None:
        self._loader, self._count = loader, count
        # Not a fork of this process, whose threads may hold locks; the server has the imports and forks in no time.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pal.train.sources"])
        self._process: multiprocessing.context.ForkServerProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Its id; None if it does not run."""
        return None if self._process is None else self._process.pid

    def load(self, step: int, requests: Sequence[Request]) -> list[MicroBatch]:
        """Load the micro-batches of a step; see `LoaderProcesses`."""
        for _ in range(_TRIES):
            connection = self._connection or self._start()
            try:
                connection.send(list(requests))
                return _receive(connection)
            except (EOFError, OSError):
                code = self._end(_PATIENCE)
                how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
                logger.warning("a loader process ended %s at step %d; it is started again", how, step)
        raise LoaderError(
            f"a loader process ended {_TRIES} times at step {step}, the last time {how}; look for its own message, "
            "give it more memory, or set keep.loader to 'threads'"
        )

    def close(self) -> None:
        """End the process; what it is loading is lost."""
        self._end(_PATIENCE)

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._loader, torch.get_num_threads(), self._count)
        self._process = self._context.Process(target=_serve, args=arguments, name="pal-data", daemon=True)
        try:
            with _STARTING:
                self._process.start()
        finally:
            theirs.close()  # so that the end of the process ends the connection
        self._connection = ours
        return ours

    def _end(self, patience: float) -> int | None:
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()  # which it takes as a request to end
            self._connection = None
        if process is None:
            return None
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return code


def _serve(connection: Connection, loader: LoadsGroups, threads: int, count: int) -> None:
    """What a process does until the other end of its connection is closed, also by the training process's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends this one
    torch.set_num_threads(threads)  # sums of other numbers of threads may differ in their last bits
    loader.waveforms.max_bytes //= count
    with suppress(EOFError, OSError):
        while True:
            requests: list[Request] = connection.recv()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    done = [loader(*request) for request in requests]
                except Exception as error:
                    _send_error(connection, error)
                    continue
            _send(connection, done, [(str(warning.message), warning.category) for warning in caught])


def _send(connection: Connection, done: list[MicroBatch], warned: list[tuple[str, type[Warning]]]) -> None:
    """Samples go as plain bytes: neither pickled nor in shared memory, of which containers have little."""
    waveforms = [samples_N.contiguous() for micro_batch in done for samples_N in micro_batch.batch.waveforms]
    assert all(samples_N.dtype == torch.float32 for samples_N in waveforms), "samples are float32"
    assert not any(micro_batch.batch.encoded for micro_batch in done), "encoded clips are made in the training process"
    bare = [replace(micro_batch, batch=replace(micro_batch.batch, waveforms=[])) for micro_batch in done]
    sizes = [[len(samples_N) for samples_N in micro_batch.batch.waveforms] for micro_batch in done]
    connection.send((bare, sizes, warned))
    for samples_N in waveforms:
        if len(samples_N):
            connection.send_bytes(samples_N.numpy().data.cast("B"))


def _receive(connection: Connection) -> list[MicroBatch]:
    answer = connection.recv()
    if isinstance(answer[0], str):
        kind, text, trace = answer
        error = getattr(pal.errors, kind)(text) if kind else LoaderError(f"a loader process failed: {text}")
        error.add_note(trace)
        raise error
    bare, sizes, warned = answer
    done = []
    for micro_batch, lengths in zip(bare, sizes, strict=True):
        waveforms = [torch.empty(length) for length in lengths]
        for samples_N in waveforms:
            if len(samples_N):
                connection.recv_bytes_into(samples_N.numpy().data.cast("B"))
        done.append(replace(micro_batch, batch=replace(micro_batch.batch, waveforms=waveforms)))
    for text, category in warned:
        warnings.warn(text, category, stacklevel=4)
    return done


def _send_error(connection: Connection, error: Exception) -> None:
    known = isinstance(error, PalError) and type(error).__module__ == pal.errors.__name__
    text = str(error) if known else f"{type(error).__name__}: {error}"
    connection.send((type(error).__name__ if known else "", text, "in a loader process:\n" + traceback.format_exc()))
