"""Residual projectors: they pass on what a connector trained by `ctc` says, before they have learned anything."""

import pytest
import torch

from pal.errors import ConfigError
from pal.integrations.projector import ProjectorOptions, projector
from pal.registry import build
from pal.types import AudioFeatures
from tests.identities.models import make_backbone

D = 32


@pytest.fixture(scope="module")
def llm():
    return make_backbone("llama")


def at_size(x, llm):
    """Each vector with the root mean square of the LLM's embeddings."""
    return llm.embedding_rms * x / x.square().mean(-1, keepdim=True).sqrt()


def heard(*lengths):
    generator = torch.Generator().manual_seed(0)
    return AudioFeatures(torch.randn(len(lengths), max(lengths), D, generator=generator), lengths, 0.08)


def made(llm, **options):
    torch.manual_seed(1)
    return build("integration", {"projector": "residual", **options}, in_width=D, llm=llm)


def test_rows_of_plits_are_the_features(llm):
    features = heard(5, 3)
    rows_USD = made(llm, name="plits").inject(features, llm).rows_USD
    torch.testing.assert_close(rows_USD, at_size(features.x_BAE, llm))
    embedded_XD = llm.lm.get_input_embeddings().weight
    assert rows_USD.square().mean().sqrt().item() == pytest.approx(embedded_XD.square().mean().sqrt().item(), rel=0.1)


def test_summary_rows_of_pal_are_means(llm):
    features = heard(6)
    rows_USD = made(llm, name="pal", stride=3).inject(features, llm).rows_USD
    torch.testing.assert_close(rows_USD, at_size(features.x_BAE.unflatten(1, (2, 3)).mean(2), llm))


@pytest.mark.parametrize("name", ["lal", "pal"])
def test_keys_and_values_are_those_of_the_features(llm, name):
    """As if the features were what a layer of the LLM gets."""
    features = heard(6)
    route = made(llm, name=name, hidden=8)
    keys = route.inject(features, llm).keys
    for layer in route.layers:
        block = llm.lm.get_decoder().layers[layer]
        x_BAD = block.input_layernorm(at_size(features.x_BAE, llm))
        k_BGAC = block.self_attn.k_proj(x_BAD).unflatten(2, (llm.kv_heads, -1)).transpose(1, 2)
        v_BGAC = block.self_attn.v_proj(x_BAD).unflatten(2, (llm.kv_heads, -1)).transpose(1, 2)
        found = keys.keys_values(layer)
        for one, other in zip(found, (k_BGAC, v_BGAC), strict=True):
            torch.testing.assert_close(one, other)


def test_they_learn(llm):
    options = ProjectorOptions(projector="residual", hidden=6, depth=3)
    torch.manual_seed(0)
    one = projector(options, D, llm)
    x = torch.randn(7, D)
    torch.testing.assert_close(one(x), at_size(x, llm))
    torch.testing.assert_close(one(17 * x), one(x))  # whatever the size of the features
    loss = (one(x) - torch.randn(7, D)).square().mean()
    loss.backward()
    last = one.inner[-1]
    assert last.weight.grad.abs().sum() > 0 and last.bias.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter))
    hidden = torch.nn.functional.gelu(one.inner[0](x))
    hidden = torch.nn.functional.gelu(one.inner[2](hidden))
    sized = one.rms * x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(one(x), sized + hidden @ last.weight.T + last.bias, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in one.parameters()) == 1 + D * 6 + 6 + 6 * 6 + 6 + 6 * D + D


def test_another_width_is_refused(llm):
    with pytest.raises(ConfigError, match="give the connector width: 32"):
        build("integration", {"name": "lal", "projector": "residual"}, in_width=10, llm=llm)
