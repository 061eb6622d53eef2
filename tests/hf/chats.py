"""Models with open gates, chats about noise and what the processor makes of them, for tests of `pal.hf`."""

import json

import pytest
import torch

from pal.registry import toy
from tests.models import ENCODER, INTEGRATIONS, noise, tiny_model

QUESTION = "What sound is this?"
KINDS: dict[str, dict] = {
    **{name: {"integration": name} for name in (*INTEGRATIONS, "lal_audio_query")},
    "flamingo": {"integration": {"name": "flamingo", "every": 2}},
    "pal_routed": {"integration": "pal_routed", "encoders": [toy("encoder", "whisper"), ENCODER]},
    "of its own each": {
        "integration": "lal",
        "encoders": [ENCODER, toy("encoder", "whisper")],
        "connector": [toy("connector", "qformer"), "mlp"],
    },
}


def model_of(kind):
    """A model whose gates are open."""
    model = tiny_model(**KINDS[kind])
    with torch.no_grad():
        for parameter in model.integration.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def say(*parts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def heard(clip):
    return {"type": "audio", "audio": clip}


def chat(seconds, seed=0, question=QUESTION):
    return [say(heard((noise(seconds, seed).numpy(), 16_000)), question)]


def tensors(processor, *chats, **options):
    return processor.apply_chat_template(
        list(chats), tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


def new_ids(model, inputs, **options):
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


one_kind = pytest.mark.parametrize("pair", ["pal"], indirect=True)
"""For what does not depend on the integration."""


def turns(seconds, seed, answer, *before):
    return [*before, *chat(seconds, seed), say(answer, role="assistant")]


def left_out(folder):
    return set(json.loads((folder / "config.json").read_text())["left_out"])
