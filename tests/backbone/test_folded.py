"""Norm, k and v projection folded into a projector's last layer, against the layers one after the other."""

import pytest
import torch
from torch import nn

from pal.backbone.folded import fold, pays
from pal.backbone.llm import FAMILIES, Backbone, LoRA
from pal.bench.flops import flop_counter
from tests.models import LLM, noise, tiny_model

A, M = 7, 8


def backbone(family, **more):
    torch.manual_seed(0)
    llm = Backbone.load({**LLM, "model_type": family, "head_dim": 8, "hidden_size": 64, **more})
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_(1.0, 0.3)
    return llm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_layers_one_after_the_other(family, bias):
    llm = backbone(family)
    last = nn.Linear(M, llm.width, bias=bias)
    h_BAM = torch.randn(2, A, M) * torch.logspace(-2, 1, A)[:, None]
    for layer in range(llm.n_layers):
        folded = llm.fold_kv(layer, last)
        assert folded is not None
        with torch.no_grad():
            expected = llm.project_kv(layer, last(h_BAM))
            counter = flop_counter()
            with counter:
                found = llm.folded_kv(layer, folded, h_BAM)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        kv = llm.kv_heads * llm.head_width
        assert counter.get_total_flops() == 2 * 2 * A * M * (2 * kv + M + 1)
        assert counter.get_total_flops() < 2 * 2 * A * llm.width * (M + 2 * kv)


def test_wide_projectors_and_adapters_are_left_alone():
    llm = backbone("llama")
    assert llm.fold_kv(0, nn.Linear(llm.width, llm.width)) is None
    assert not pays(2048, 2048, 512)
    assert pays(768, 2048, 512)
    last = nn.Linear(M, llm.width)
    llm.add_lora(LoRA(targets=("v_proj",)))
    assert llm.fold_kv(0, last) is None


def test_it_is_gone_when_a_weight_changes():
    llm = backbone("qwen2")
    block = llm.lm.model.layers[0]
    last = nn.Linear(M, llm.width)
    parts = (last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)
    for part in parts:
        for parameter in part.parameters():
            folded = fold(*parts)
            assert folded is not None and folded.fresh()
            with torch.no_grad():
                parameter.add_(0.0)
            assert not folded.fresh()
    folded = fold(*parts)
    last.to(torch.float64)
    assert not folded.fresh()


@pytest.mark.parametrize("name", ["lal", "pal", "pal_routed", "plits", "lal_audio_query"])
def test_a_model_says_the_same(name):
    narrow = {"hidden": 4} if name in ("lal", "pal") else {}
    model = tiny_model({"name": name, **narrow})
    clips = [noise(1.0, 1), noise(2.0, 2)]
    plain = model.index((clips[0].numpy(), 16_000))
    before = model.ask([(clip.numpy(), 16_000) for clip in clips], "What sound is this?")
    digest = model.digest
    layers = model.fold()
    assert (layers > 0) == bool(narrow)
    folded = model.index((clips[0].numpy(), 16_000))
    assert model.digest == digest and set(model.state_dict()) == set(tiny_model({"name": name, **narrow}).state_dict())
    for one, other in zip(folded.streams, plain.streams, strict=True):
        torch.testing.assert_close(one.k_LBGAC, other.k_LBGAC, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.v_LBGAC, other.v_LBGAC, atol=1e-5, rtol=1e-5)
        # not to the last bit: the folded product was really used
        assert torch.equal(one.k_LBGAC, other.k_LBGAC) == (layers == 0)
    assert model.ask([(clip.numpy(), 16_000) for clip in clips], "What sound is this?") == before


def test_training_does_not_use_it():
    model = tiny_model({"name": "lal", "hidden": 4})
    model.fold()
    projectors = model.integration.projectors
    assert projectors.folded(0) is None  # gradients are on
    with torch.no_grad():
        assert projectors.folded(0) is not None
        model.integration.projectors.of(0)[-1].weight.mul_(2)
        assert projectors.folded(0) is None
        assert projectors.folded(1) is not None
