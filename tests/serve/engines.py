"""Asking an engine without HTTP."""

import hashlib
from dataclasses import dataclass, field
from queue import Queue

import torch

from pal.audio import Waveform
from pal.conversations import read_question
from pal.serve.engine import Engine
from pal.serve.requests import AnswerPiece, EngineRequest, Failed, Finished, Indexed, RequestClip
from pal.serve.sampling import SamplingOptions
from tests.models import noise, tone

CLIPS = [noise(0.5, 1), tone(0.7, 440.0), noise(1.1, 2)]


def wave(samples_N):
    return Waveform(samples_N, 16_000, len(samples_N) / 16_000, "clip")


def clip_of(samples_N):
    return RequestClip(hashlib.sha256(samples_N.numpy().tobytes()).hexdigest(), wave(samples_N))


@dataclass
class Asked:
    """A request and what came back."""

    engine: Engine
    request: EngineRequest
    events: Queue = field(default_factory=Queue)

    def wait(self):
        """All texts, with the pieces; raises the error of a request that failed."""
        self.pieces, texts, self.finish = [], {}, {}
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished | Indexed):
                self.end = event
                return [texts[choice] for choice in sorted(texts)]
            assert isinstance(event, AnswerPiece)
            self.pieces.append(event)
            texts[event.choice] = texts.get(event.choice, "") + event.text
            if event.finish:
                self.finish[event.choice] = event.finish


def ask(engine, question, clips=(), **options):
    """Submit a question or chat about clips."""
    model = engine.model
    (row,) = read_question(question, len(clips), model.tokenizer, model.config.style).tokens
    asked = Asked(engine, None)
    asked.request = EngineRequest(
        row, [clip_of(one) for one in clips], SamplingOptions(**options), lambda event: asked.events.put(event)
    )
    engine.submit(asked.request)
    return asked


def alone(model, question, clips=(), max_tokens=16, **options):
    """What `PalModel.ask` answers."""
    given = [(one, 16_000) for one in clips]
    with torch.inference_mode():
        return model.ask(given if len(given) != 1 else given[0], question, max_new_tokens=max_tokens, **options)
