"""`adapters: with_audio`: text alone is answered by the LLM as it was before training."""

import copy

import pytest
import torch

from pal import answering
from pal.backbone.finetuning import LoRA
from tests.models import noise, tiny_model

QUESTION = "What sound is this?"


@pytest.fixture
def model():
    model = tiny_model("pal", adapters="with_audio")
    model.llm.add_lora(LoRA(r=4, targets=("q_proj", "v_proj", "up_proj")))
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def always(model):
    other = copy.deepcopy(model)
    other.config = model.config.model_copy(update={"adapters": "always"})
    return other


def bare(model):
    """The model without its adapters at all."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.llm.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return other


def test_text_alone_is_answered_without_adapters(model):
    clip = (noise(0.5).numpy(), 16_000)
    plain, full = bare(model), always(model)
    text = plain.ask([], QUESTION, max_new_tokens=12)
    heard = full.ask(clip, QUESTION, max_new_tokens=12)
    assert text != full.ask([], QUESTION, max_new_tokens=12)  # so that the adapters do something
    assert heard != plain.ask(clip, QUESTION, max_new_tokens=12)
    assert model.ask([], QUESTION, max_new_tokens=12) == text
    assert "".join(model.ask([], QUESTION, stream=True, max_new_tokens=12)) == text
    assert model.ask_detailed([], QUESTION, max_new_tokens=12)[0].text == text
    assert model.ask(clip, QUESTION, max_new_tokens=12) == heard
    assert "".join(model.ask(clip, QUESTION, stream=True, max_new_tokens=12)) == heard


def test_a_batch_of_both_keeps_its_order(model):
    from pal.data.prompts import encode

    rows = [
        encode(model.tokenizer, [{"role": "user", "content": f"{place}{word}"}], clips)
        for place, word, clips in (("", "yes", []), ("<audio>", "no", [0]), ("", "no", []), ("<audio>", "yes", [0]))
    ]
    clips = [noise(0.5)]
    plain, full = bare(model), always(model)
    options = {"max_new_tokens": 8, "num_beams": 2, "num_return_sequences": 2}
    expected = [
        text
        for row in rows
        for text in (full if row.clips else plain).generate(clips if row.clips else [], [row], **options)
    ]
    assert answering.generate(model, clips, rows, **options) == expected


def test_evaluation_and_training_keep_the_adapters(model):
    from pal.data.prompts import encode

    row = encode(model.tokenizer, [{"role": "user", "content": QUESTION}], [])
    assert model.generate([], [row], max_new_tokens=12) == always(model).generate([], [row], max_new_tokens=12)


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_as_before_afterwards(model, fails):
    from pal.backbone import adapters

    model.llm.requires_grad_(False)
    chosen = next(p for name, p in model.llm.named_parameters() if "lora_A" in name)
    chosen.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with adapters.disabled(model.llm):
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.ask((noise(0.5).numpy(), 16_000), QUESTION) == always(model).ask(
        (noise(0.5).numpy(), 16_000), QUESTION
    )


def test_the_setting_is_saved(model, tmp_path):
    import pal

    model.save_pretrained(tmp_path / "bundle")
    again = pal.load(tmp_path / "bundle")
    assert again.config.adapters == "with_audio"
    assert again.ask([], QUESTION) == model.ask([], QUESTION)
