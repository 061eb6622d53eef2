"""Prompts, options and observers that the tests of generation share."""

import pytest
from transformers import DynamicCache

from pal.backbone.generate import padded_left
from pal.types import AUDIO
from tests.identities.models import (
    CROSSED,
    PLACEMENTS,
    conversation,
    features,
)

OURS = ("llama", "qwen3", "gemma3", "mistral")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RAGGED = [
    conversation(PLACEMENTS["turns"]),
    conversation([5, AUDIO, 9], (1,)),
    conversation(PLACEMENTS["none"]),
    conversation(PLACEMENTS["end"]),
]
crossed = pytest.mark.parametrize(("family", "name"), [pair for pair in CROSSED if pair[0] in OURS])


def inputs_of(llm, integration, side="left", rows=RAGGED):
    return integration(features(7, 11), rows, llm, side)


def plain(llm, inputs, **options):
    """transformers' loop and cache, the layers hearing by attention to several sets of keys: what was done before."""
    inputs = padded_left(inputs)
    audio = {} if inputs.audio_context is None else {"audio_context": inputs.audio_context.prebuilt()}
    return llm.lm.generate(
        inputs_embeds=inputs.inputs_embeds_BTD,
        attention_mask=inputs.attention_mask_BT,
        position_ids=inputs.position_ids_BT,
        past_key_values=DynamicCache(),
        **audio,
        **options,
    )


class Watch:
    """Only looks, or says that it does not."""

    def __init__(self, read_only):
        self.read_only = read_only
        self.seen = []

    def __call__(self, said, logits):
        self.seen.append((said.clone(), logits.clone()))
        return logits
