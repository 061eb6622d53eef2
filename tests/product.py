"""Every encoder with every connector, integration and family of LLMs: what a user may join must work.

`make cross-product` tries all of it; `test_product.py` a sample in which every two choices meet.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pal.backbone.tokenizer import train_tokenizer
from pal.config import parse
from pal.data.prompts import encode, user_turn
from pal.model import PalModel
from pal.model_config import ModelConfig
from pal.registry import toy
from pal.types import Batch
from tests.identities.models import fields
from tests.models import WORDS, noise

ENCODERS = ("tiny", "whisper", "clap", "sslam", "af_whisper")
INTEGRATIONS = ("plits", "lal", "pal", "pal_routed", "flamingo", "lal_audio_query")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral")


class Choice(NamedTuple):
    """One model; more than one encoder where the connector takes two."""

    encoders: tuple[str, ...]
    connector: str
    integration: str
    family: str


HEARING = [
    *(((encoder,), connector) for encoder, connector in product(ENCODERS, ("mlp", "qformer"))),
    *((pair, "lfst") for pair in combinations(ENCODERS, 2)),
]
CHOICES = [Choice(*hearing, *rest) for hearing, *rest in product(HEARING, INTEGRATIONS, FAMILIES)]


def name(choice: Choice) -> str:
    """The choice as an id of a test."""
    return "-".join(("+".join(choice.encoders), *choice[1:]))


def build(choice: Choice) -> PalModel:
    """The model with small parts and random weights, gates open."""
    torch.manual_seed(0)
    llm = fields(choice.family) | {"vocab_size": 320, "bos_token_id": None, "head_dim": 8}
    if "sliding_window" in llm:
        llm["sliding_window"] = 64  # the answers must see some of the audio for a gradient to reach it
    config = {
        "llm": {"fresh": llm},
        "encoders": [toy("encoder", encoder) for encoder in choice.encoders],
        "connector": toy("connector", choice.connector),
        "integration": choice.integration if choice.integration != "flamingo" else {"name": "flamingo", "every": 2},
    }
    model = PalModel.from_config(parse(ModelConfig, config, where="product"), train_tokenizer(WORDS, 320))
    with torch.no_grad():
        for parameter in model.integration.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def check(choice: Choice, folder: Path) -> None:
    """Forward, backward, generate, save, load, the same logits again."""
    model = build(choice)
    tokenizer = model.tokenizer
    # longer than a window of some, shorter than one of others
    clips = [noise(seconds, seed, model.sampling_rate) for seed, seconds in enumerate((1.3, 0.4, 2.7))]
    turns = [[user_turn(WORDS[i % 2], 1), {"role": "assistant", "content": "yes"}] for i in range(3)]
    rows = [encode(tokenizer, turn, [i], train=True) for i, turn in enumerate(turns)]
    asked = [encode(tokenizer, turn[:1], [i]) for i, turn in enumerate(turns)]

    loss = model.loss(Batch(clips, rows))
    loss.sum.backward()
    assert torch.isfinite(loss.sum)
    for part in ("connector", "projectors"):
        for weight, parameter in model.parts()[part].named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"no gradient reaches {part} {weight}"
    for encoder in model.ears.encoders:
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())

    def logits(model: PalModel) -> torch.Tensor:
        with torch.inference_mode():
            return model.llm(model.inputs(clips, asked, padding_side="left")).logits

    logits_BTV = logits(model)
    words = model.llm.generate(model.inputs(clips, asked, padding_side="left"), max_new_tokens=3, pad_token_id=0)
    assert torch.equal(words[:, 0], logits_BTV[:, -1].argmax(-1))
    answers = model.generate(clips, asked, max_new_tokens=3)
    assert answers == [
        model.generate([clips[i]], [replace(asked[i], clips=[0])], max_new_tokens=3)[0] for i in range(3)
    ]

    model.save_pretrained(folder / "bundle", full=True)
    again = PalModel.from_pretrained(folder / "bundle")
    assert again.digest == model.digest
    assert torch.equal(logits(again), logits_BTV)
    assert again.generate(clips, asked, max_new_tokens=3) == answers


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_every_choice(choice: Choice, tmp_path: Path) -> None:
    check(choice, tmp_path)
