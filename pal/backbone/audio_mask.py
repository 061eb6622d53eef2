"""Masks of audio (`AudioMask`), by stream, clip and time of each token (`TokenSpans`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from pal.errors import ConfigError

EDGE = 1e-4
"""Seconds by which a token must overlap a time span to be in it: more than round-off, less than any token."""


@dataclass(frozen=True)
class AudioMask:
    """Mask of audio that no query sees. Positions and the audio's own K/V and embeddings do not change.

    An audio row still sees itself: a prompt may end in one (PLITS), which predicts the first token. Each field
    restricts the mask; without any field, all audio is masked.
    """

    pathway: Literal["keys", "rows"] | None = None
    """Audio K/V (LAL), or audio rows of the sequence (PLITS, summaries)."""
    stream: int | None = None
    """Number of the stream (a connector's output), from 0."""
    layers: Collection[int] | None = None
    """Layers in which it is masked; None: all."""
    seconds: tuple[float, float] | None = None
    """Time span from the start of the clip: tokens that overlap it are masked."""
    share: tuple[float, float] | None = None
    """Time span in shares of the clip, from 0 to 1, so that clips of any length lose the same share."""

    @property
    def timed(self) -> bool:
        """Mask depends on the tokens' times."""
        return self.seconds is not None or self.share is not None

    @property
    def placed(self) -> bool:
        """Mask depends on the tokens' stream or time."""
        return self.stream is not None or self.timed

    def check(self, streams: int, layers: int) -> None:
        """Raise ConfigError for an empty time span, and for streams or layers that the model does not have."""
        for times in (self.seconds, self.share):
            if times is not None and not 0 <= times[0] < times[1]:
                raise ConfigError(f"{times[0]:g} to {times[1]:g} cannot be hidden: the end must lie after the start")
        if self.stream is not None and not 0 <= self.stream < streams:
            raise ConfigError(f"stream {self.stream} cannot be hidden; the model has 0 to {streams - 1}")
        wrong = sorted(set(self.layers or ()) - set(range(layers)))
        if wrong:
            raise ConfigError(f"layer {wrong[0]} cannot be hidden; the LLM has 0 to {layers - 1}")


@dataclass(frozen=True)
class TokenSpans:
    """Stream, clip and time span of each row or key; all [B, X]."""

    stream_BX: Tensor
    """Number of the stream; -1 for text and padding."""
    clip_BX: Tensor
    """Number of the clip within its conversation; -1 for text and padding."""
    start_BX: Tensor
    """Seconds from the start of the clip; NaN for tokens without a time, and for text."""
    end_BX: Tensor

    def chosen(self, what: AudioMask) -> Tensor:
        """Entries of the stream and the time span that `what` names: bool [B, X].

        Raises:
            ConfigError: a time span, for tokens without a time.
        """
        chosen_BX = self.stream_BX >= 0
        if what.stream is not None:
            chosen_BX = self.stream_BX == what.stream
        if what.timed and bool(self.start_BX[chosen_BX].isnan().any()):
            raise ConfigError("a span of time cannot be hidden here: the connector's tokens have no time of their own")
        if what.seconds is not None:
            start, end = what.seconds
            chosen_BX = chosen_BX & (self.start_BX < end - EDGE) & (self.end_BX > start + EDGE)
        if what.share is not None:
            lengths_BX = self.lengths()
            start_BX, end_BX = (share * lengths_BX for share in what.share)
            chosen_BX = chosen_BX & (self.start_BX < end_BX - EDGE) & (self.end_BX > start_BX + EDGE)
        return chosen_BX

    def lengths(self) -> Tensor:
        """Length in seconds of each entry's clip, the end of its last token: [B, X]."""
        clips = int(self.clip_BX.max()) + 2 if self.clip_BX.numel() else 1
        ends_BY = self.end_BX.new_zeros(len(self.end_BX), clips)
        ends_BY = ends_BY.scatter_reduce(1, self.clip_BX + 1, self.end_BX.nan_to_num(), "amax")
        return ends_BY.gather(1, self.clip_BX + 1)

    def ordered(self, order_BT: Tensor) -> TokenSpans:
        """The entries reordered by indices [B, T]."""
        return TokenSpans(*(getattr(self, part.name).gather(1, order_BT) for part in fields(self)))
