"""One answer that is being generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal.serve.requests import AnswerPiece, EngineRequest, Finished
from pal.serve.sampling import TokenLogprob, TokenSampler, token_logprob
from pal.serve.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


COLDEST = 1e-4
"""Lowest temperature that is sampled with; below it logits would overflow, and the most likely token is as good."""


class ChoiceState:
    """One answer of a request: chooses its tokens and emits its pieces.

    Args:
        request: whose answer it is.
        number: of the answer, from 0.
        most: tokens that it may have.
        ends: ids that end an answer.
        tokenizer: of the model.
        device: of the logits.
    """

    def __init__(
        self,
        request: EngineRequest,
        number: int,
        most: int,
        ends: frozenset[int],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self.request, self.number, self.most, self.ends = request, number, most, ends
        options = request.options
        self.sampler = TokenSampler(options, number, device) if options.temperature >= COLDEST else None
        self.text = TextStream(tokenizer, options.stop)
        self.last = 0
        """The newest token."""
        self.count = 0
        self.ended = False
        self._logprobs: list[TokenLogprob] = []

    def advance(self, logits_V: Tensor, greedy: int) -> None:
        """Choose the next token and emit the text that it completes.

        Args:
            logits_V: float32.
            greedy: the most likely token.
        """
        options = self.request.options
        token = greedy if self.sampler is None else self.sampler.choose(logits_V)
        if token in self.ends:
            self._end("stop")
            return
        self.last = token
        self.count += 1
        self.request.usage.completion += 1
        if options.top_logprobs is not None:
            self._logprobs.append(token_logprob(logits_V, token, options.top_logprobs))
        piece = self.text.push(token)
        if self.text.stopped:
            self._end("stop", piece)
        elif self.count >= self.most:
            self._end("length", piece)
        elif piece:
            self._emit(piece)

    def _end(self, reason: str, piece: str = "") -> None:
        self.ended = True
        piece += self.text.finish()
        if self.text.stopped:  # perhaps only in the last piece
            reason = "stop"
        self._emit(piece, reason)

    def _emit(self, piece: str, finish: str | None = None) -> None:
        tokens, self._logprobs = tuple(self._logprobs), []
        self.request.emit(AnswerPiece(self.number, piece, tokens, finish))


def finish(request: EngineRequest) -> None:
    """Emit that all answers have ended."""
    request.emit(Finished(request.usage))
