"""Choice of the next token of each sequence, independent of what else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

_SEEDS = 1 << 63


@dataclass(frozen=True)
class SamplingOptions:
    """How the answers of one request are chosen, and when they end."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0: the most likely token."""
    top_p: float = 1.0
    seed: int | None = None
    """None: another one each time."""
    stop: tuple[str, ...] = ()
    n: int = 1
    """Answers."""
    top_logprobs: int | None = None
    """Most likely tokens of each place that are reported with their log-probabilities; None: no log-probabilities."""


class TokenSampler:
    """Random choices of one answer, from a generator of its own.

    Args:
        options: of the request.
        choice: number of the answer; answer k of seed s is drawn with seed s + k.
        device: of the logits.
    """

    def __init__(self, options: SamplingOptions, choice: int, device: torch.device) -> None:
        self.warpers: list[LogitsProcessor] = []
        if options.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_p < 1:
            self.warpers.append(TopPLogitsWarper(options.top_p))
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((options.seed + choice) % _SEEDS)

    def choose(self, logits_V: Tensor) -> int:
        """A token, from float32 logits."""
        scores_1V = logits_V[None]
        for warper in self.warpers:
            scores_1V = warper(None, scores_1V)
        p_V = F.softmax(scores_1V[0], dim=-1)
        return int((p_V / torch.empty_like(p_V).exponential_(1, generator=self._generator)).argmax())


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, and the most likely ones at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits_V: Tensor, token: int, top: int) -> TokenLogprob:
    """Log-probability of a token by the model's own distribution, before temperature and top_p."""
    logprobs_V = F.log_softmax(logits_V.float(), dim=-1)
    found: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
        found = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs_V[token]), found)
