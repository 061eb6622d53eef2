"""A fork server whose decoder does harm where a file says so, for tests of what the server makes of it."""

import os
import resource
import signal
import threading
import time
import warnings

import numpy as np

from pal.audio import load_into
from pal.errors import AudioError, AudioWarning
from pal.serve.decode_worker import run

HANG, NATIVE_HANG, SEGFAULT, ABORT, EXIT = b"hang", b"native hang", b"segfault", b"abort", b"exit"
KILLED, HUGE, MUCH, HIDDEN, BUG = b"killed", b"huge", b"much", b"hidden", b"bug"
NAN, ENDLESS, WARNS, WRITES, ID, KEY, LARGE = b"nan", b"endless", b"warns", b"writes", b"id", b"key", b"large"


def decode(parts, data, rate, limits, name):
    if data == HANG:
        while True:
            time.sleep(1)
    elif data == NATIVE_HANG:
        lock = threading.Lock()
        signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, 32)))
        with lock:
            lock.acquire()
    elif data == SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif data == ABORT:
        os.abort()
    elif data == EXIT:
        os._exit(0)
    elif data == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    elif data == HUGE:
        bytearray(1 << 40)
    elif data == MUCH:
        held = []
        while len(held) < 512:
            held.append(np.ones(1 << 17))  # 1 MiB
    elif data == HIDDEN:
        try:
            bytearray(1 << 40)
        except MemoryError:
            raise AudioError(f"{name}: it is damaged") from None
    elif data == BUG:
        raise KeyError("a decoder's own fault")
    elif data == NAN:
        parts.append(np.full(100, np.nan, np.float32))
        return 100 / rate, name, None
    elif data == ENDLESS:
        while True:
            parts.append(np.zeros(1 << 16, np.float32))
    elif data == WARNS:
        warnings.warn("the clip: read as far as it goes", AudioWarning, stacklevel=1)
        parts.append(np.zeros(100, np.float32))
        return 100 / rate, name, "a note"
    elif data == WRITES:
        kinds = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)
        parts.append(np.array([resource.getrlimit(kind)[1] for kind in kinds] + [os.nice(0)], np.float32))
        return 1.0, name, None
    elif data == ID:
        parts.append(np.array([os.getpid()], np.float32))
        return 1.0, name, None
    elif data == LARGE:
        parts.append(np.arange(5_000_000, dtype=np.float32))
        return 5.0, name, None
    elif data == KEY:
        parts.append(np.array(["PAL_API_KEY" in os.environ], np.float32))
        return 1.0, name, None
    return load_into(parts, data, rate, limits, name)


def main():
    run(decode)
