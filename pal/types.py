"""Types passed between the parts, and the legend of the shape suffixes.

Every tensor name ends in its axes:

    B  conversations of a batch, or clips where a tensor is about clips alone
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
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pal.transfer import length_mask

if TYPE_CHECKING:
    from pal.backbone.context import AudioContext
    from pal.backbone.packed import PackedContext

AUDIO = -1
"""Id of a clip's placeholder in a list of token ids. No vocabulary has it, so tokenizers need no new token."""

IGNORE = -100
"""Label of a row without loss (transformers' convention)."""


PaddingSide = Literal["left", "right", "none", "any"]
"""Side of the padding of shorter conversations; "none": packed without padding; "any": packed or on the right."""


@dataclass(frozen=True)
class AudioFeatures:
    """Output of an encoder or a connector for some clips: padded tokens, lengths and time scale."""

    x_BAE: Tensor
    lengths: tuple[int, ...]
    """Real tokens of each clip; they come first. Python integers: reading them does not wait for the device."""
    seconds_per_token: float

    def __post_init__(self) -> None:
        clips, tokens = self.x_BAE.shape[:2]
        assert len(self.lengths) == clips, f"{len(self.lengths)} lengths of {clips} clips"
        assert all(type(n) is int and 0 <= n <= tokens for n in self.lengths), f"lengths are integers of 0 to {tokens}"

    @property
    def padded(self) -> bool:
        """True if some clip has padding."""
        return any(n < self.x_BAE.shape[1] for n in self.lengths)

    @cached_property
    def mask_BA(self) -> Tensor:  # noqa: N802
        """True where a token is real; computed on the tokens' device, without a synchronisation."""
        with torch.inference_mode(False):  # a tensor of inference mode, once cached, could not be used for gradients
            return length_mask(self.lengths, self.x_BAE.shape[1], self.x_BAE.device)


@dataclass(frozen=True)
class Tokens:
    """One conversation as token ids, with `AUDIO` in the place of each clip."""

    ids: list[int]
    clips: list[int]
    """Index in the batch of the clip of each `AUDIO`, in order; conversations may share a clip."""
    labels: list[int] | None = None
    """The id itself for trained tokens, `IGNORE` elsewhere; as long as `ids`."""
    predicts_after: frozenset[int] | None = None
    """Indices in `ids` of clips whose next token is predicted; None: clips directly before a labelled token. A clip at
    the end always counts."""
    columns: list[int] | None = None
    """A number of the caller's choice for each of `ids`, returned in `LLMInputs.columns_BT`."""

    def __post_init__(self) -> None:
        assert self.ids.count(AUDIO) == len(self.clips)
        assert self.labels is None or len(self.labels) == len(self.ids)

    def predicts_at(self, place: int) -> bool:
        """True if the token at index `place`, the first one behind clips, is predicted."""
        if place == len(self.ids):
            return True
        if self.predicts_after is not None:
            return place - 1 in self.predicts_after
        return self.labels is not None and self.labels[place] != IGNORE


@dataclass(frozen=True)
class EncodedClip:
    """Encoder features of one clip, used in place of its waveform."""

    x_AE: tuple[Tensor, ...]
    """Real tokens [A, E] from each of the model's encoders; A and E differ between encoders."""
    seconds: float
    """Length of the clip."""


def waveform_seconds(samples_N: Tensor, rate: int) -> float:
    """Length of a waveform at `rate` Hz."""
    return len(samples_N) / rate


@dataclass(frozen=True)
class Frames:
    """Front-end frames of some clips, on the host: windows, one clip after the other."""

    blocks_WFM: tuple[Tensor, ...]
    """Batches of windows for the network, zero-padded [W, F, M]."""
    lengths: tuple[tuple[int, ...], ...]
    """Real frames of each window, for each block."""
    windows: tuple[int, ...]
    """Windows of each clip."""


@dataclass(frozen=True)
class PreparedClips:
    """Clips preprocessed on the host, ready for the encoders; any thread may make them."""

    parts: tuple[Frames | AudioFeatures, ...]
    """For each of the model's encoders: front-end frames, or features if the clips are already encoded."""
    clips: int

    def __len__(self) -> int:
        return self.clips


@dataclass(frozen=True)
class Batch:
    """Clips and conversations that the trainer and the evaluator hand to the model."""

    waveforms: list[Tensor]
    """Each clip once, mono float32 [N] at the encoder's sampling rate; empty if `encoded` has the clips."""
    conversations: list[Tokens]
    records: list[str] = field(default_factory=list)
    """Ids of the records that the conversations come from."""
    tags: list[list[TagSpan] | None] | None = None
    """Sound events of each clip; None for clips without annotation."""
    encoded: list[EncodedClip] = field(default_factory=list)
    """Encoder features of each clip, instead of the waveforms."""
    prepared: PreparedClips | None = None
    """The same clips, preprocessed; used instead of `waveforms` and `encoded` if given."""

    @property
    def clips(self) -> list[Tensor] | list[EncodedClip] | PreparedClips:
        """The clips that `Tokens.clips` index."""
        return self.prepared or self.encoded or self.waveforms

    def durations(self, rate: int) -> list[float]:
        """Seconds of each clip; `rate` is that of the waveforms in Hz."""
        return [clip.seconds for clip in self.encoded] or [waveform_seconds(x_N, rate) for x_N in self.waveforms]

    def seconds(self, rate: int) -> float:
        """Seconds of all clips together; `rate` is that of the waveforms in Hz."""
        return sum(self.durations(rate))


@dataclass(frozen=True)
class TagSpan:
    """Label of a sound event in a clip; without times, the event is anywhere in the clip."""

    label: str
    start: float | None = None
    """Seconds from the start of the clip."""
    end: float | None = None


@dataclass(frozen=True)
class Targets:
    """The labelled tokens of a batch and the rows that predict them; N tokens in order."""

    rows_N: Tensor
    """Index of the row that predicts each token, among all rows of the batch, padding included."""
    labels_N: Tensor
    """Token ids."""
    conversations_N: Tensor
    """Index of each token's conversation."""
    lengths: tuple[int, ...]
    """Number of tokens of each answer (consecutive labelled tokens)."""
    conversations: int
    """Number of conversations in the batch."""


@dataclass(frozen=True)
class LLMInputs:
    """The LLM's inputs, made by an integration; code after it does not depend on which one."""

    inputs_embeds_BTD: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor
    audio_context: AudioContext | PackedContext | None
    """Audio keys and values; None if there are none. With a `PackedContext`, rows are packed: B is 1 unless all
    conversations are equally long and have no audio keys."""
    labels_BT: Tensor | None
    targets: Targets | None = None
    """Labelled tokens and the rows that predict them, computed on the host; None: derived from `labels_BT`."""
    columns_BT: Tensor | None = None
    """`Tokens.columns` of each text row, on the host; `IGNORE` for padding, audio rows and repeated rows. Only with
    padded rows, if all conversations have columns."""
