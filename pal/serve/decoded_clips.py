"""A clip that several requests bring at once is decoded once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from weakref import WeakValueDictionary

from pal.clips import Waveform


class DecodedClips:
    """Samples by the digest of a clip's bytes, for as long as a request holds them; for several threads."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[str, Waveform] = WeakValueDictionary()
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
        self._lock = Lock()

    def get(self, digest: str, decode: Callable[[], Waveform]) -> Waveform:
        """The samples that another request holds, or decodes at the moment; else those of `decode`.

        Where `decode` fails, each request tries for itself, since errors name the clip as its client did.
        """
        with self._lock:
            turn = self._turns.setdefault(digest, _Turn())
        with turn.lock:
            found = self._held.get(digest)
            if found is None:
                found = self._held[digest] = decode()
            return found


class _Turn:
    """Lock of a clip: one of the requests that bring it decodes, and the others wait for it."""

    def __init__(self) -> None:
        self.lock = Lock()
