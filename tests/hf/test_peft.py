"""Adapters, the bundle's own and those of the real PEFT: they load, train, merge and come back."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForMultimodalLM,
)

from pal.backbone.finetuning import LoRA
from pal.errors import BundleError, PalError
from pal.hf import PalForConditionalGeneration, PalProcessor
from tests.hf.chats import chat, left_out, tensors, turns
from tests.hf.training import trainer
from tests.models import LLM, pal, tiny_model


def test_adapters_of_a_bundle_load_and_merge(foreign, tmp_path):
    model = pal.load(foreign)
    model.llm.add_lora(LoRA(r=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "lora")
    assert loaded.pal.digest == model.digest
    inputs = tensors(PalProcessor.of(model), chat(0.5))
    before = loaded(**inputs).logits
    plain = AutoModelForMultimodalLM.from_pretrained(foreign)(**inputs).logits
    assert (before - plain).abs().max() > 1e-2
    loaded.merge_adapters()
    torch.testing.assert_close(loaded(**inputs).logits, before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "merged")
    merged = pal.load(tmp_path / "merged")
    assert merged.digest == loaded.pal.digest
    weights = {f"llm.lm.model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qv"}
    assert left_out(foreign) - left_out(tmp_path / "merged") == weights


def test_peft_adapters_load_and_merge(foreign, tmp_path):
    base = AutoModelForMultimodalLM.from_pretrained(foreign)
    inputs = tensors(PalProcessor.of(base.pal), chat(0.5))
    plain = base(**inputs).logits
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=r".*llm\.lm.*\.(q|v)_proj", init_lora_weights=False))
    before = adapted(**inputs).logits
    assert (before - plain).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")

    # by PEFT, by transformers from the adapter's folder, and into a loaded model
    fresh = AutoModelForMultimodalLM.from_pretrained(foreign)
    by_peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(by_peft(**inputs).logits, before)
    by_auto = AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(by_auto(**inputs).logits, before)
    with pytest.raises(BundleError, match="merge_adapters"):
        by_auto.save_pretrained(tmp_path / "no")

    by_auto.merge_adapters()
    merged = by_peft.merge_and_unload()
    for number, one in enumerate((by_auto, merged)):
        torch.testing.assert_close(one(**inputs).logits, before, atol=1e-4, rtol=1e-4)
        one.save_pretrained(tmp_path / f"merged{number}")
        again = pal.load(tmp_path / f"merged{number}")
        assert again.digest == one.pal.digest
        assert left_out(tmp_path / f"merged{number}")


# What PEFT can do to a model whose head and embeddings are one matrix


LAYERS = r".*llm\.lm.*q_proj"
WAYS = {
    "head": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]},
    "both": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "both as one": {
        "target_modules": LAYERS,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "LoRA on embeddings": {"target_modules": r".*llm\.lm.*(q_proj|embed_tokens)"},
    "LoRA on the head": {"target_modules": r".*llm\.lm.*(q_proj|lm_head)"},
    "LoRA on both": {"target_modules": r".*llm\.lm.*(q_proj|lm_head|embed_tokens)"},
    "rows": {"target_modules": LAYERS, "trainable_token_indices": [5, 6, 40]},
    "rows of both": {"target_modules": LAYERS, "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 7]}},
    "the same rows of both": {
        "target_modules": LAYERS,
        "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]},
    },
    "integration": {"target_modules": LAYERS, "modules_to_save": ["integration"]},
    "encoder": {"target_modules": LAYERS, "modules_to_save": ["encoders.0", "connectors.0"]},
    "biases": {"target_modules": LAYERS, "bias": "all"},
    "all layers": {"target_modules": "all-linear"},
}


def tied_model(family="llama"):
    fields = {**LLM, "model_type": family, "tie_word_embeddings": True, "head_dim": 8}
    return PalForConditionalGeneration.wrap(tiny_model(llm={"fresh": fields})).eval()


def adapted(way, model=None):
    """Adapted in a way and trained a little, so that each adapter does something."""
    torch.manual_seed(2)
    model = get_peft_model(model or tied_model(), LoraConfig(r=2, lora_dropout=0.1, **WAYS[way])).train()
    inputs = answered(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def answered(model):
    processor = PalProcessor.of(model.get_base_model().pal)
    made = processor.apply_chat_template(
        [turns(0.3, 0, "yes"), turns(0.4, 1, "no")], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return {**made, "labels": made["input_ids"].masked_fill(made.pop("assistant_masks") == 0, -100)}


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_was_trained_is_what_is_merged_saved_and_loaded(way, tmp_path):
    """Trap: merged into a matrix that is shared, an adapter of the head would change the embeddings, or be lost."""
    with torch.enable_grad():
        model = adapted(way)
    inputs = tensors(PalProcessor.of(model.get_base_model().pal), chat(0.3), chat(0.4, 1))
    trained = model(**inputs).logits
    assert (trained - tied_model()(**inputs).logits).abs().max() > 1e-2
    says = model.generate(**inputs, max_new_tokens=4)
    model.save_pretrained(tmp_path / "adapter")

    by_peft = PeftModel.from_pretrained(tied_model(), tmp_path / "adapter")
    torch.testing.assert_close(by_peft(**inputs).logits, trained, atol=1e-5, rtol=1e-5)
    by_hand = PeftModel.from_pretrained(tied_model(), tmp_path / "adapter").get_base_model()
    by_hand.merge_adapters()
    merged = model.merge_and_unload()
    for number, one in enumerate((by_hand, merged)):
        torch.testing.assert_close(one(**inputs).logits, trained, atol=2e-4, rtol=1e-4)
        one.save_pretrained(tmp_path / str(number), full=bool(number))
        again = AutoModelForMultimodalLM.from_pretrained(tmp_path / str(number))
        assert again.pal.digest == one.pal.digest
        torch.testing.assert_close(again(**inputs).logits, one(**inputs).logits, atol=5e-5, rtol=1e-5)
        assert again.generate(**inputs, max_new_tokens=4).equal(says)


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("way", ["head", "embeddings", "LoRA on embeddings", "rows"])
def test_other_families(family, way, tmp_path):
    model = adapted(way, tied_model(family))
    inputs = answered(model)
    with torch.no_grad():
        trained = model(**inputs).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, trained, atol=5e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "m")
    assert pal.load(tmp_path / "m").digest == merged.pal.digest


def test_a_head_untied_by_hand_beside_an_llm_that_lies_elsewhere(tmp_path):
    donor = tied_model().pal
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    model = PalForConditionalGeneration.wrap(tiny_model(llm=str(tmp_path / "llm")))
    head = model.pal.llm.lm.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)
    model.save_pretrained(tmp_path / "m")
    assert "llm.lm.model.embed_tokens.weight" in left_out(tmp_path / "m")
    assert "llm.lm.lm_head.weight" not in left_out(tmp_path / "m")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert again.pal.digest == model.pal.digest
    assert not again.pal.llm.lm.config.tie_word_embeddings
    # and again, and as transformers' own folder
    again.save_pretrained(tmp_path / "n")
    assert pal.load(tmp_path / "n").digest == model.pal.digest
    again.pal.llm.save(tmp_path / "own")
    alone = tiny_model(llm=str(tmp_path / "own"))
    assert alone.llm.lm.lm_head.weight.equal(head.weight)


def test_statistics_of_a_frozen_encoder_stay(tmp_path):
    """Trap: they would move with each batch, while no adapter holds them."""

    def statistics(model):
        return {name: x.clone() for name, x in model.state_dict().items() if "running" in name}

    model = tied_model()
    start = statistics(model)
    assert start
    moved = statistics(adapted("all layers", model).get_base_model())
    assert [x for x in start.values() if x.abs().max() > 0]
    for name, before in start.items():
        found = [x for other, x in moved.items() if other.replace("base_layer.", "") == name]
        assert len(found) == 1 and found[0].equal(before)
    # they move where the encoder itself is trained, and are saved with it
    model = adapted("encoder", tied_model())
    copies = {name: x for name, x in statistics(model).items() if "modules_to_save" in name}
    assert any(
        not x.equal(start[name.split("model.", 2)[-1].replace("modules_to_save.default.", "")])
        for name, x in copies.items()
    )
    whole = tied_model().train()
    whole(**answered_by(whole))
    assert any(not x.equal(start[name]) for name, x in statistics(whole).items())
    whole = tied_model()
    whole.pal.ears.requires_grad_(False)
    whole.train()(**answered_by(whole))
    assert all(x.equal(start[name]) for name, x in statistics(whole).items())


def answered_by(model):
    return tensors(PalProcessor.of(model.pal), chat(0.3), chat(0.4, 1))


@pytest.mark.parametrize("way", ["all layers", "head", "rows", "encoder"])
def test_trainer_resumes_adapters_and_puts_the_best_back(way, tmp_path):
    def wrapped():
        torch.manual_seed(5)
        return get_peft_model(tied_model(), LoraConfig(r=2, **WAYS[way]))

    def weights(folder):
        return get_peft_model_state_dict(PeftModel.from_pretrained(tied_model(), folder))

    def same(model, folder):
        found, expected = get_peft_model_state_dict(model), weights(folder)
        assert found.keys() == expected.keys() != set()
        return all(found[name].equal(expected[name]) for name in found)

    model = wrapped()
    trainer(model, tmp_path, scores=[1.0, 0.5]).train()
    first, last = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert same(model, first) and not same(model, last)
    again = wrapped()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(last))
    assert same(again, last)


def test_models_with_adapters_are_not_saved_as_bundles(tmp_path):
    for way in ("head", "rows", "all layers"):
        model = get_peft_model(tied_model(), LoraConfig(r=2, **WAYS[way])).get_base_model()
        with pytest.raises(BundleError, match="merge_adapters"):
            model.save_pretrained(tmp_path / "no")


def test_rows_are_trained_for_head_and_embeddings():
    """As PEFT does it for any tied LLM: a new token can be heard of and said."""
    model = adapted("rows")
    lm = model.get_base_model().pal.llm.lm
    plain = tied_model().pal.llm.lm.lm_head.weight
    merged = model.merge_and_unload().pal.llm.lm
    assert merged is lm and lm.lm_head.weight is lm.model.embed_tokens.weight
    changed = (lm.lm_head.weight != plain).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= {5, 6, 40} and 5 in changed


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*llm\.lm.*(q_proj|lm_head)"},
        {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    ],
)
def test_rows_of_what_is_adapted_otherwise_are_refused(options):
    """PEFT itself merges them into wrong weights, or dies at the first batch."""
    with pytest.raises(PalError, match=r"trainable_token_indices .* cannot be merged; leave one") as caught:
        get_peft_model(tied_model(), LoraConfig(r=2, trainable_token_indices=[5, 6], **options)).train()
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@torch.no_grad()
def test_adapters_by_transformers_own_way(tmp_path):
    """`add_adapter`: saved alone, as transformers does it; once deleted, the bundle is what it was."""
    tied_model().save_pretrained(tmp_path / "base")
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    digest = model.pal.digest
    model.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False))
    with torch.enable_grad():
        trainer(model, tmp_path / "run", max_steps=1).train()
    saved = tmp_path / "run" / "checkpoint-1"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    inputs = tensors(PalProcessor.of(model.pal), chat(0.3))
    trained = model.eval()(**inputs).logits
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    plain = loaded(**inputs).logits
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(PeftModel.from_pretrained(loaded, saved)(**inputs).logits, trained)
    torch.testing.assert_close(AutoModelForMultimodalLM.from_pretrained(saved)(**inputs).logits, trained)

    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "without")
    torch.testing.assert_close(model(**inputs).logits, plain)
    assert pal.load(tmp_path / "without").digest == digest == model.pal.digest
