"""The values that travel between the parts, and the legend of the shape suffixes.

Every tensor name ends in its axes:

    B  batch rows (conversations), or clips where a tensor is about clips alone
    T  rows of the LLM's sequence: text, and audio rows where an integration has them
    A  audio tokens of a clip          S  summary tokens of a clip
    L  layers with audio               D  width of the LLM
    E  width of encoder or connector   H  query heads
    G  key/value heads                 C  width of a head
    Q  query rows of one call          K  key rows of one call
    F  frames of a front-end           M  mel bins
    N  samples of a waveform           W  windows of an encoder
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal.transfer import real_ones

if TYPE_CHECKING:
    from pal.backbone.context import AudioContext
    from pal.backbone.packed import PackedContext

AUDIO = -1
"""Stands in a list of token ids where a clip goes. No vocabulary has it, so none needs a new token."""

IGNORE = -100
"""Label of a row without loss (transformers' convention)."""


@dataclass(frozen=True)
class AudioFeatures:
    """What an encoder or a connector says of some clips: tokens, how many of them are real, and their time scale."""

    x_BAE: Tensor
    lengths: tuple[int, ...]
    """Real tokens of each clip; they come first. Python's integers: the host knows them without asking the device."""
    seconds_per_token: float

    def __post_init__(self) -> None:
        clips, tokens = self.x_BAE.shape[:2]
        assert len(self.lengths) == clips, f"{len(self.lengths)} lengths of {clips} clips"
        assert all(type(n) is int and 0 <= n <= tokens for n in self.lengths), f"lengths are integers of 0 to {tokens}"

    @property
    def padded(self) -> bool:
        """Whether a clip has fewer real tokens than there are."""
        return any(n < self.x_BAE.shape[1] for n in self.lengths)

    @cached_property
    def mask_BA(self) -> Tensor:  # noqa: N802
        """True where a token is real; on the tokens' device, made without waiting for it."""
        with torch.inference_mode(False):  # it is kept, and may then be asked for where gradients are taken
            return real_ones(self.lengths, self.x_BAE.shape[1], self.x_BAE.device)


@dataclass(frozen=True)
class Tokens:
    """One conversation as token ids, with `AUDIO` where each clip goes."""

    ids: list[int]
    clips: list[int]
    """For each `AUDIO` in order, which clip of the batch stands there; rows may share a clip."""
    labels: list[int] | None = None
    """The id itself where it is trained, `IGNORE` elsewhere; as long as `ids`."""
    predicts_after: frozenset[int] | None = None
    """Places in `ids` of clips behind which the LLM is asked what follows; None where a trained id follows. It always
    is behind a clip that ends the conversation."""
    columns: list[int] | None = None
    """A number of the caller's for each of `ids`, to be found again in `LLMInputs.columns_BT`."""

    def __post_init__(self) -> None:
        assert self.ids.count(AUDIO) == len(self.clips)
        assert self.labels is None or len(self.labels) == len(self.ids)

    def predicts_at(self, place: int) -> bool:
        """Whether the LLM is asked what stands at `place`, the first one behind clips."""
        if place == len(self.ids):
            return True
        if self.predicts_after is not None:
            return place - 1 in self.predicts_after
        return self.labels is not None and self.labels[place] != IGNORE


@dataclass(frozen=True)
class EncodedClip:
    """Encoder features of one clip, used in place of its waveform."""

    x_AE: tuple[Tensor, ...]
    """Of each of the model's encoders the real tokens [A, E], in numbers and widths of their own."""
    seconds: float
    """Length of the clip."""


def waveform_seconds(samples_N: Tensor, rate: int) -> float:
    """Length of a waveform at `rate` Hz."""
    return len(samples_N) / rate


@dataclass(frozen=True)
class Frames:
    """Front-end frames of some clips, on the host: windows, one clip after the other."""

    blocks_WFM: tuple[Tensor, ...]
    """The windows that the network takes at once, zero-padded [W, F, M]."""
    lengths: tuple[tuple[int, ...], ...]
    """Real frames of each window, for each block."""
    windows: tuple[int, ...]
    """Windows of each clip."""


@dataclass(frozen=True)
class PreparedClips:
    """Clips preprocessed on the host, ready for the encoders; any thread may make them."""

    parts: tuple[Frames | AudioFeatures, ...]
    """For each of the model's encoders the frames, or what it made of the clips before."""
    clips: int

    def __len__(self) -> int:
        return self.clips


@dataclass(frozen=True)
class Batch:
    """Clips and conversations that the trainer and the evaluator hand to the model."""

    waveforms: list[Tensor]
    """Each clip once, mono float32 [N] at the encoder's sampling rate; none where `heard` has the clips."""
    conversations: list[Tokens]
    records: list[str] = field(default_factory=list)
    """The ids of the records the rows were made from."""
    tags: list[list[TagSpan] | None] | None = None
    """Per clip, what is known to sound in it; None where the data says nothing."""
    encoded: list[EncodedClip] = field(default_factory=list)
    """Encoder features of each clip, instead of the waveforms."""

    prepared: PreparedClips | None = None
    """The same clips made ready ahead; the model then takes these."""

    @property
    def clips(self) -> list[Tensor] | list[EncodedClip] | PreparedClips:
        """What the rows' `clips` count in."""
        return self.prepared or self.encoded or self.waveforms

    def durations(self, rate: int) -> list[float]:
        """Seconds of each clip, given the waveforms' rate."""
        return [clip.seconds for clip in self.encoded] or [waveform_seconds(x_N, rate) for x_N in self.waveforms]

    def seconds(self, rate: int) -> float:
        """Length of all clips, given the waveforms' rate."""
        return sum(self.durations(rate))


@dataclass(frozen=True)
class TagSpan:
    """A label that holds in a clip; without times it holds somewhere in it."""

    label: str
    start: float | None = None
    """Seconds from the start of the clip."""
    end: float | None = None


@dataclass(frozen=True)
class Targets:
    """The labelled tokens of a batch and the rows that predict them; N tokens in order."""

    rows_N: Tensor
    """Number of the row that predicts each, among all rows of the sequence, padding included."""
    labels_N: Tensor
    conversations_N: Tensor
    """Which conversation each belongs to."""
    lengths: tuple[int, ...]
    """Tokens of each answer, a run of labelled tokens."""
    conversations: int


@dataclass(frozen=True)
class LLMInputs:
    """The LLM's inputs, made by an integration; nothing after it knows which one."""

    inputs_embeds_BTD: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor
    audio_context: AudioContext | PackedContext | None
    """With a `PackedContext` the conversations lie one after the other, and B is 1 unless they are equally long."""
    labels_BT: Tensor | None
    targets: Targets | None = None
    """What the labels ask for, as the host knows it; None where that is to be read from the labels."""
    columns_BT: Tensor | None = None
    """`Tokens.columns` of the text that each row is, on the host; `IGNORE` in padding, audio rows and rows that ask
    again. Of padded rows only, where all conversations have such numbers."""
