"""Alignment of connectors with the LLM's vocabulary: CTC of their tokens against the LLM's own token embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pal.config import StrictConfig
from pal.data.manifest import Record
from pal.errors import ConfigError
from pal.model import PalModel
from pal.transfer import to_device
from pal.types import IGNORE, AudioFeatures, Tokens

logger = logging.getLogger(__name__)

FACTOR = 20.0
"""Factor on the cosines at first."""


class Alignment(nn.Module):
    """CTC scores of a connector's tokens: the cosines to the embeddings of a vocabulary, times a learned factor.

    Cosines and not products, which are as large for a long vector of another direction: with products the tokens learn
    cosines of about 0.1 to the right embedding and 20 times its length, and an LLM makes nothing of them.

    Tokens of another width than the LLM's are mapped to it first, by a linear layer that only this objective uses.
    The vocabulary is every token of the stage's answers, and the blank. So a connector learns to say, token by token
    and in order, what is heard, in the space of the LLM's own embeddings. The LLM's layers are not run. (Connectionist
    temporal classification: Graves et al. 2006; `torch.nn.functional.ctc_loss`.)

    Args:
        model: its tokenizer and embeddings; embeddings stay as they are.
        answers: all answers of the stage.
    """

    class Config(StrictConfig):
        """Options of the objective `ctc`: none."""

    def __init__(self, model: PalModel, answers: Iterable[str]) -> None:
        super().__init__()
        self._tokenizer = model.tokenizer
        self._reported: set[str] = set()
        texts = sorted(set(answers))
        used = sorted({token for ids in self._words(texts) for token in ids})
        self._place = {token: place for place, token in enumerate(used)}
        self._used_V = torch.tensor(used)
        D = model.llm.width
        self.linears = nn.ModuleList(
            nn.Identity() if stream.width == D else nn.Linear(stream.width, D) for stream in model.ears.streams
        )
        self.blank_D = nn.Parameter(torch.randn(model.llm.width) / model.llm.width**0.5)
        self.factor = nn.Parameter(torch.tensor(FACTOR))

    def targets(self, conversations: Sequence[Tokens]) -> list[tuple[int, list[int]]]:
        """Clip of each conversation, and its answer as places in the vocabulary.

        Raises:
            ConfigError: a conversation has several clips or answers.
        """
        found = []
        for one in conversations:
            labels = one.labels or []
            answers = sum(now != IGNORE and before == IGNORE for before, now in pairwise([IGNORE, *labels]))
            if len(one.clips) != 1 or answers != 1:
                raise ConfigError(
                    "objective 'ctc' takes one clip, one question and one answer; leave out 'turns' and sources with "
                    "several clips or turns in a record"
                )
            ids = [token for token in labels if token != IGNORE]
            (words,) = self._words([self._text(ids)])
            found.append((one.clips[0], [self._place[token] for token in words]))
        return found

    def forward(
        self, streams: Sequence[AudioFeatures], embedded_VD: Tensor, targets: Sequence[tuple[int, Sequence[int]]]
    ) -> tuple[Tensor, int, tuple[Tensor, int]]:
        """Summed loss of all streams, number of target tokens, and (answers that are the best path, answers).

        An answer with more tokens than its clip has no alignment; it is left out, and a warning says so once.

        Args:
            streams: features of each connector.
            embedded_VD: embeddings of `vocabulary`.
            targets: index of a clip and its answer as places in the vocabulary, for each answer.
        """
        total = embedded_VD.new_zeros((), dtype=torch.float32)
        hits = torch.zeros((), device=embedded_VD.device)
        items = tries = 0
        for stream, linear in zip(streams, self.linears, strict=True):
            kept = [(clip, target) for clip, target in targets if self._fits(target, stream.lengths[clip])]
            if not kept:
                continue
            counts = tuple(len(target) for _, target in kept)
            lengths = tuple(stream.lengths[clip] for clip, _ in kept)
            wanted = torch.zeros(len(kept), max(counts), dtype=torch.long)
            for row, (_, target) in enumerate(kept):
                wanted[row, : len(target)] = torch.tensor(target)
            wanted_BL, clips_B = to_device(wanted, embedded_VD.device), torch.tensor([clip for clip, _ in kept])
            scores_UAV = self._scores(linear(stream.x_BAE), embedded_VD)
            scores_BAV = scores_UAV[to_device(clips_B, embedded_VD.device)]
            total = total + F.ctc_loss(
                scores_BAV.log_softmax(-1).transpose(0, 1),
                wanted_BL,
                lengths,  # type: ignore[arg-type]  # stubs lack the overload that waits for no device
                counts,  # type: ignore[arg-type]
                blank=len(self._place),
                reduction="sum",
            )
            items += sum(counts)
            hits = hits + _hits(scores_BAV.detach(), wanted_BL, lengths, counts)
            tries += len(kept)
        return total, items, (hits, tries)

    @property
    def vocabulary(self) -> Tensor:
        """Token ids [V] of the vocabulary, without the blank."""
        return self._used_V

    def _scores(self, x_BAD: Tensor, embedded_VD: Tensor) -> Tensor:
        """Scores [B, A, V + 1], the blank last; in float32, since bfloat16 has steps of 0.1 at the scores' size."""
        table_VD = F.normalize(torch.cat([embedded_VD.float(), self.blank_D[None]]), dim=-1)
        with torch.autocast(x_BAD.device.type, enabled=False):
            return self.factor * (F.normalize(x_BAD.float(), dim=-1) @ table_VD.T)

    def _words(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they stand within a sentence, with a space before their first word."""
        if not texts:
            return []
        spaced = [f" {text.strip()}" for text in texts]
        found: list[list[int]] = self._tokenizer(spaced, add_special_tokens=False)["input_ids"]
        return found

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _fits(self, target: Sequence[int], tokens: int) -> bool:
        # between equal tokens of the target there is a blank
        needed = len(target) + sum(a == b for a, b in pairwise(target))
        if target and needed <= tokens:
            return True
        text = self._text([int(self._used_V[place]) for place in target])
        if text not in self._reported:
            self._reported.add(text)
            why = f"{tokens} connector tokens are too few" if target else "an empty answer has no tokens"
            logger.warning("objective 'ctc' leaves out the answer '%s' of a clip: %s", text, why)
        return False


def answers_of(records: Iterable[Record]) -> set[str]:
    """Last answers of records."""
    return {record.turns[-1].answer for record in records}


def _hits(scores_BAV: Tensor, wanted_BL: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Number of clips whose best path, without repetitions and blanks, is the target; stays on the device."""
    blank, device = scores_BAV.shape[2] - 1, scores_BAV.device
    best_BA = scores_BAV.argmax(-1)
    before_BA = F.pad(best_BA[:, :-1], (1, 0), value=blank)
    lengths_B1 = to_device(torch.tensor(lengths), device)[:, None]
    inside_BA = torch.arange(best_BA.shape[1], device=device) < lengths_B1
    kept_BA = (best_BA != blank) & (best_BA != before_BA) & inside_BA
    place_BA = (kept_BA.cumsum(1) - 1).clamp(0, wanted_BL.shape[1] - 1)
    same_BA = best_BA == wanted_BL.gather(1, place_BA)
    counts_B = to_device(torch.tensor(list(counts)), device)
    return ((kept_BA.sum(1) == counts_B) & (same_BA | ~kept_BA).all(1)).sum()
