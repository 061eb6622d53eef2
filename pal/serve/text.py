"""Text of an answer while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"
"""What a tokenizer writes for bytes that are no character yet."""


class TextStream:
    """Pieces of text that, joined, are the decoded answer without white space at its ends, up to a stop string.

    No piece ends within a character, and none holds what may be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        stops: strings that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        """A stop string was found."""
        self._ids: list[int] = []
        self._context = 0
        """First id that is decoded again, since the text of an id depends on the one before."""
        self._done = 0
        """Ids whose text was taken."""
        self._waiting = ""
        """Text that was decoded and not given out."""
        self._begun = False

    def push(self, token: int) -> str:
        """The piece of text that a token completes, often empty."""
        self._ids.append(token)
        text = self._new()
        return self._given(text) if text and not text.endswith(_UNFINISHED) else ""

    def finish(self) -> str:
        """The last piece."""
        if self.stopped:
            return ""
        text = self._given(self._new())
        if not self.stopped:
            text += self._waiting.rstrip() if text or self._begun else self._waiting.strip()
            self._waiting = ""
        return text

    def _new(self) -> str:
        before = self._decoded(self._ids[self._context : self._done])
        return self._decoded(self._ids[self._context :])[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _given(self, text: str) -> str:
        """Take decoded text; returns what of the waiting text can be given out."""
        self._context, self._done = self._done, len(self._ids)
        self._waiting += text
        found = [place for place in (self._waiting.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped = True
            text, self._waiting = self._waiting[: min(found)].rstrip(), ""
        else:
            end = len(self._waiting) - self._possible_stop()
            text = self._waiting[:end].rstrip()
            self._waiting = self._waiting[len(text) :]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text

    def _possible_stop(self) -> int:
        """Most characters at the end of the waiting text with which a stop string may begin."""
        longest = max(map(len, self.stops), default=1) - 1
        for count in range(min(longest, len(self._waiting)), 0, -1):
            if any(stop.startswith(self._waiting[-count:]) for stop in self.stops):
                return count
        return 0
