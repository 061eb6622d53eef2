"""What the engine is asked, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pal.backbone.audio_kv import AudioKV
from pal.clips import Waveform
from pal.errors import PalError
from pal.serve.sampling import SamplingOptions, TokenLogprob
from pal.types import Tokens


class QueueFullError(PalError):
    """The queue holds as many requests as it may."""


class ClosingError(PalError):
    """The server is stopping and takes no more requests."""


class TooLongError(PalError):
    """A conversation that does not fit into the model's context."""


@dataclass(frozen=True)
class RequestClip:
    """A clip with the digest of its bytes; its keys and values, if the cache had them."""

    digest: str
    clip: Waveform | AudioKV


@dataclass(frozen=True)
class AnswerPiece:
    """The next piece of one answer."""

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    """Tokens since the last piece, if log-probabilities were asked for."""
    finish: str | None = None
    """At the end: `stop` or `length`."""


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    """Text and audio tokens."""
    audio: int = 0
    cached: int = 0
    """Audio tokens whose keys and values were in the cache."""
    completion: int = 0
    """Of all answers, their end tokens not counted."""


@dataclass(frozen=True)
class Finished:
    """All answers of a request have ended."""

    usage: Usage


@dataclass(frozen=True)
class Indexed:
    """A clip's keys and values are in the cache."""

    audio: AudioKV


@dataclass(frozen=True)
class Failed:
    """The request could not be answered."""

    error: Exception


@dataclass(frozen=True)
class Computed:
    """What the function of a request returned."""

    value: object


Event = AnswerPiece | Finished | Indexed | Computed | Failed


@dataclass(eq=False)
class EngineRequest:
    """A conversation to be answered, a clip to be indexed, or a function of clips to be run.

    `emit` is called by the engine's thread, at last with `Finished`, `Indexed`, `Computed` or `Failed`, unless it was
    cancelled.
    """

    conversation: Tokens | None
    """`clips` are indices into the request's clips; None to index the clip, or to run `function`."""
    clips: list[RequestClip]
    options: SamplingOptions
    emit: Callable[[Event], None]
    function: Callable[[list[AudioKV]], object] | None = None
    """Run by the engine's thread between two steps, so that it may use the model; takes the keys and values of the
    request's clips. All answers wait for it."""
    usage: Usage = field(default_factory=Usage)
    cancelled: bool = False
    """Set by `Engine.cancel`."""
    since: float = field(default_factory=time.monotonic)
    """When it was made, by `time.monotonic`."""
