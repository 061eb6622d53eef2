"""Tiny models of every integration that all hear, and questions about clips of several lengths."""

from types import SimpleNamespace

import soundfile
import torch

from pal.data.manifest import Record, Turn
from tests.models import noise, tiny_model

OPTIONS = {"flamingo": {"every": 2}}
"""Where the defaults do not fit three layers."""


def listener(name, **options):
    model = tiny_model({"name": name, **OPTIONS.get(name, {})}, **options)
    with torch.no_grad():
        for parameter_name, parameter in model.integration.named_parameters():
            if parameter_name.endswith("gate"):
                parameter.fill_(1.0)  # an untrained gate is shut
    return model


def questions(folder, model=None, clips=4, tasks=("sound", "speech")):
    """Two questions about each of some clips; where a model is given, what it says is right."""
    records = []
    for number in range(clips):
        path = str(folder / f"{number}.wav")
        soundfile.write(path, noise(0.6 + 0.1 * number, number).numpy(), 16_000)
        asked = ["What sound is this?", "Is it loud?"]
        answers = ["yes", "no"] if model is None else model.ask(path, asked, max_new_tokens=32)
        for task, question, answer in zip(tasks, asked, answers, strict=True):
            records.append(
                Record(f"{number}-{task}", (path,), (Turn(question, answer),), task, "test", (answer, "none of it"))
            )
    return records


def answered(monkeypatch, right):
    """Answers are right where `right(record, hidden)` says so, and never without audio; nothing is generated."""

    def evaluate(model, records, **_):
        return SimpleNamespace(
            items=[
                SimpleNamespace(
                    id=one.id, task=one.task, correct=right(one, model._masks), no_audio_correct=False, error=None
                )
                for one in records
            ]
        )

    monkeypatch.setattr("pal.probe.masked_eval.evaluate", evaluate)
