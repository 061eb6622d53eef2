"""A cache that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Protocol, TypeVar


class Sized(Protocol):
    """What the cache keeps."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...


T = TypeVar("T", bound=Sized)


class ByteLRU:
    """Values of known size by key; beyond a number of bytes the least recently used ones are dropped.

    Any thread may use it. A value that is in use stays alive with its user after it was dropped.

    Args:
        max_bytes: of all values together; a single value that is larger is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, Sized] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, kind: type[T]) -> T | None:
        """The value, which is then the most recently used one; None where there is none."""
        with self._lock:
            value = self._kept.get(key)
            if value is None:
                return None
            self._kept.move_to_end(key)
        assert isinstance(value, kind)
        return value

    def put(self, key: Hashable, value: Sized) -> None:
        """Keep a value, if it is not too large."""
        size = value.nbytes
        with self._lock:
            old = self._kept.pop(key, None)
            if old is not None:
                self.nbytes -= old.nbytes
            if size > self.max_bytes:
                return
            self._kept[key] = value
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
