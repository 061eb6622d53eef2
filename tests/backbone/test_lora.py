"""LoRA's own formula, worked out by hand: W x + alpha / rank B A x, with dropout before A while it trains."""

import torch

from pal.backbone.finetuning import LoRA
from pal.backbone.llm import Backbone
from tests.models import LLM


def adapted(**options):
    torch.manual_seed(0)
    llm = Backbone.load(LLM)
    llm.add_lora(LoRA(**options))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return llm, llm.lm.model.layers[1].self_attn.q_proj


@torch.no_grad()
def test_alpha_by_rank_scales_what_is_added():
    x = torch.randn(5, LLM["hidden_size"])
    for rank, alpha in ((2, 16), (4, 4), (8, 1)):
        llm, layer = adapted(r=rank, alpha=alpha)
        llm.eval()
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        expected = x @ layer.base_layer.weight.T + alpha / rank * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), expected)
        llm.merge_adapters()
        torch.testing.assert_close(llm.lm.model.layers[1].self_attn.q_proj(x), expected)


@torch.no_grad()
def test_dropout_hides_its_share_of_what_goes_into_adapters():
    llm, layer = adapted(r=4, dropout=0.25)
    x = torch.ones(4000, LLM["hidden_size"])
    llm.train()
    kept = layer.lora_dropout.default(x)
    assert abs((kept == 0).float().mean() - 0.25) < 0.01
    assert not layer(x).equal(layer(x))
    llm.eval()
    assert layer(x).equal(layer(x))
    llm, layer = adapted(r=4, dropout=0.0)
    llm.train()
    assert layer(x).equal(layer(x))
