"""The seconds of a clip that an answer attended to most. Attention shows where a model looked, and proves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pal.clips import AudioInput, read_clip
from pal.conversations import read_question
from pal.data.prompts import encode, user_turn
from pal.errors import PalError
from pal.probe.attention_stats import record_attention
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
    if not answer:
        raise PalError("an empty answer attends to nothing; ask something else")
    heard = read_clip(clip, model.sampling_rate)
    (asked,) = read_question(question, 1, model.tokenizer, model.config.style).tokens
    said = encode(model.tokenizer, [user_turn(question, 1), {"role": "assistant", "content": answer}], [0], train=True)
    ids = [*asked.ids, *(token for token, label in zip(said.ids, said.labels or (), strict=True) if label != IGNORE)]
    row = Tokens(ids, asked.clips, [IGNORE] * len(asked.ids) + ids[len(asked.ids) :])
    bins = max(1, math.ceil(heard.seconds / seconds))
    with torch.inference_mode():
        (found,) = record_attention(model, [heard], [row], bins)
    if found.time_LNX is None:
        raise PalError("this model's audio tokens stand for no time of their own, so attention has no seconds")
    share_X = found.time_LNX[:, found.answer].double().mean((0, 1))
    share_X = share_X / share_X.sum().clamp_min(1e-12)
    length = max(end for *_, end in found.tokens_audio) / bins  # of the last token, which may outlast the clip
    best = share_X.argsort(descending=True, stable=True)[:count].tolist()
    spans = [(at * length, min((at + 1) * length, heard.seconds), float(share_X[at])) for at in best]
    return [AttendedSpan(*span) for span in spans]
