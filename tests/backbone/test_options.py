"""Options of generate: what cannot hear is refused by name, on every way to it, and what is not used passes."""

import pytest
from transformers import GenerationConfig

from pal.errors import PalError
from pal.hf import PalForConditionalGeneration, PalProcessor
from tests.hf.chats import chat, tensors
from tests.models import noise, tiny_model

CLIP = (noise(0.3).numpy(), 16_000)
REFUSED = {
    "assistant_model": object(),
    "guidance_scale": 2.0,
    "negative_prompt_ids": [[5]],
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "prefill_chunk_size": 4,
    "past_key_values": object(),
    "inputs_embeds": object(),
    "encoder_repetition_penalty": 1.3,
    "token_healing": True,
    "custom_generate": "somebody/code",
    "penalty_alpha": 0.6,
    "dola_layers": "low",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(model, name):
    wrapped = PalForConditionalGeneration.wrap(model)
    inputs = tensors(PalProcessor.of(model), chat(0.3))
    said = model.ask(CLIP, "yes", max_new_tokens=3)
    option = {name: REFUSED[name]}
    uses = [
        lambda: model.ask(CLIP, "yes", **option),
        lambda: model.ask_detailed(CLIP, "yes", **option),
        lambda: list(model.ask(CLIP, "yes", stream=True, **option)),
        lambda: wrapped.generate(**inputs, **option),
    ]
    if isinstance(REFUSED[name], float | int | str) and name not in ("custom_generate",):
        uses.append(lambda: wrapped.generate(**inputs, generation_config=GenerationConfig(**option)))
        uses.append(lambda: model.ask(CLIP, "yes", generation_config=GenerationConfig(max_new_tokens=2, **option)))
    for use in uses:
        with pytest.raises(PalError, match=f"^generate: '{name}' is not supported: .*[;]") as caught:
            use()
        assert "\n" not in str(caught.value)
    # nothing of it stays behind
    assert model.ask(CLIP, "yes", max_new_tokens=3) == said


@pytest.mark.parametrize("scale", [0.0, 0, 2.0])
def test_a_scale_of_0_is_a_scale(model, scale):
    with pytest.raises(PalError, match=r"^generate: 'guidance_scale' is not supported"):
        model.ask(CLIP, "yes", guidance_scale=scale)


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 1.0}, {"assistant_model": None}, {"token_healing": False}, {"repetition_penalty": 1.0}],
)
def test_what_is_off_passes(model, options):
    assert model.ask(CLIP, "yes", max_new_tokens=3, **options) == model.ask(CLIP, "yes", max_new_tokens=3)
