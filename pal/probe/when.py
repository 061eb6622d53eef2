"""The seconds of a clip that an answer, or each of its words, attended to. It shows where a model looked, no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pal.clips import AudioInput, Clip, read_clip
from pal.conversations import read_question
from pal.data.prompts import encode, user_turn
from pal.errors import PalError
from pal.probe.attention_mass import words
from pal.probe.attention_stats import AnswerAttention, record_attention
from pal.types import IGNORE, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel


@dataclass(frozen=True)
class AttendedSpan:
    """Stretch of a clip, and its share of the attention on the clip."""

    start: float
    """Seconds."""
    end: float
    share: float


def most_attended(
    model: PalModel, clip: AudioInput, question: str, answer: str, count: int = 3, seconds: float = 1.0
) -> list[AttendedSpan]:
    """The stretches of a clip that the rows which predict an answer attended to most, mean over heads and layers.

    Args:
        model: in evaluation mode.
        clip: what was asked about.
        question: about one clip.
        answer: the model's.
        count: most stretches to return, the most attended first.
        seconds: length of a stretch; the last one of a clip may be shorter.

    Raises:
        PalError: an empty answer, or tokens that stand for no time of their own.
    """
    heard = read_clip(clip, model.sampling_rate)
    bins = max(1, math.ceil(heard.seconds / seconds))
    found, time_LNX = _attention(model, heard, question, answer, bins)
    share_X = time_LNX[:, found.answer].double().mean((0, 1))
    share_X = share_X / share_X.sum().clamp_min(1e-12)
    length = _end(found) / bins
    best = share_X.argsort(descending=True, stable=True)[:count].tolist()
    spans = [(at * length, min((at + 1) * length, heard.seconds), float(share_X[at])) for at in best]
    return [AttendedSpan(*span) for span in spans]


class AttendedWords(NamedTuple):
    """Words of an answer, and where each attended."""

    words: list[str]
    mass_WX: Tensor
    """Attention mass of the rows that predict each word on each of X equal stretches, mean over heads and layers."""
    seconds: float
    """What the stretches cover; a little more than the clip where its last audio token outlasts it."""


def attention_by_word(model: PalModel, clip: AudioInput, question: str, answer: str, bins: int = 60) -> AttendedWords:
    """Where in a clip each word of an answer attended.

    Args:
        model: in evaluation mode.
        clip: what was asked about.
        question: about one clip.
        answer: the model's.
        bins: stretches of the clip.

    Raises:
        PalError: an answer without words, or tokens that stand for no time of their own.
    """
    found, time_LNX = _attention(model, read_clip(clip, model.sampling_rate), question, answer, bins)
    said = words(model, found)
    if not said:
        raise PalError("the answer has no words; ask something else")
    time_NX = time_LNX.double().mean(0)
    mass_WX = torch.stack([time_NX[rows].mean(0) for _, rows in said])
    return AttendedWords([word for word, _ in said], mass_WX, _end(found))


def _attention(model: PalModel, clip: Clip, question: str, answer: str, bins: int) -> tuple[AnswerAttention, Tensor]:
    """The attention of a labelled answer, and its part on the clip over time [L, N, X]."""
    if not answer:
        raise PalError("an empty answer attends to nothing; ask something else")
    (asked,) = read_question(question, 1, model.tokenizer, model.config.style).tokens
    said = encode(model.tokenizer, [user_turn(question, 1), {"role": "assistant", "content": answer}], [0], train=True)
    ids = [*asked.ids, *(token for token, label in zip(said.ids, said.labels or (), strict=True) if label != IGNORE)]
    row = Tokens(ids, asked.clips, [IGNORE] * len(asked.ids) + ids[len(asked.ids) :])
    with torch.inference_mode():
        (found,) = record_attention(model, [clip], [row], bins)
    if found.time_LNX is None:
        raise PalError("this model's audio tokens stand for no time of their own, so attention has no seconds")
    return found, found.time_LNX


def _end(found: AnswerAttention) -> float:
    """End of the last audio token in seconds, which may outlast the clip."""
    return max(end for *_, end in found.tokens_audio)
