"""Adapters, the bundle's own and those of the real PEFT: they load, train, merge and come back."""

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
)

from pal.backbone.llm import LoRA
from pal.errors import BundleError
from pal.hf import PalProcessor
from tests.hf.chats import chat, left_out, tensors
from tests.models import pal


def test_adapters_of_a_bundle_load_and_merge(foreign, tmp_path):
    model = pal.load(foreign)
    model.llm.add_lora(LoRA(rank=2))
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
    from peft import LoraConfig, PeftModel, get_peft_model

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
