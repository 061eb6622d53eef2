"""Compiled by region: one graph for all layers of a kind and all lengths, and the same numbers."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

from pal.backbone.finetuning import LoRA
from pal.registry import build
from pal.types import AUDIO, IGNORE, Tokens
from tests.counts import full_only
from tests.identities.models import INTEGRATIONS, E, features, make_backbone


def batch(seed, hears=True, clips=(17, 60)):
    """Two or three conversations of random lengths, each about a clip of its own.

    More would have as many segments as a head is wide here, and a compiler takes two sizes that are equal for one.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rows, lengths = [], []
    for clip in range(drawn(2, 4)):
        lengths.append(drawn(*clips))
        ids = [5] * drawn(1, 5) + [AUDIO] * hears + [6] * drawn(8, 30)
        rows.append(Tokens(ids, [clip] * hears, [IGNORE] * (len(ids) - 4) + ids[-4:]))
    return (features(*lengths) if hears else None), rows


def made(name, layers=1, family="llama"):
    torch._dynamo.reset()
    counters.clear()
    llm = make_backbone(family, layers)
    integration = build("integration", INTEGRATIONS.get(name, {"name": "plits"}), in_width=E, llm=llm)
    return llm, integration


def step(llm, integration, audio, rows):
    parameters = [*llm.parameters(), *integration.parameters()]
    for parameter in parameters:
        parameter.grad = None
    loss, _ = llm.loss(integration(audio, rows, llm, "none"))
    loss.backward()
    return [loss.detach(), *(p.grad for p in parameters)]


KINDS = {"text": 1, "plits": 1, "lal": 1, "pal": 2, "flamingo": 1}
"""Kinds of layers: with audio keys, and without."""


@pytest.mark.parametrize("name", KINDS)
def test_one_graph_for_each_kind_of_layer(name):
    """Batches of other lengths, ragged, then equal ones; none of them makes a graph anew, none breaks one."""
    llm, integration = made(name, layers=3)
    llm.compile(backend="eager")
    for seed in range(4):
        step(llm, integration, *batch(seed, name != "text"))
    assert counters["stats"]["unique_graphs"] == KINDS[name] and not counters["graph_break"]
    audio, rows = batch(0, name != "text")
    step(llm, integration, features(*[40] * len(rows)) if audio else None, rows)
    assert counters["stats"]["unique_graphs"] == KINDS[name]
    if name == "pal":  # short clips cost at most two graphs more
        for seed in range(20):
            step(llm, integration, *batch(seed, clips=(1, 40)))
        assert counters["stats"]["unique_graphs"] <= KINDS["pal"] + 2


def test_the_same_losses_and_gradients():
    """Of layers with and without audio keys, made again in the backward pass or not; with norms of queries and keys.

    Traced only; the two tests below, of `make torture`, go through more of the compiler.
    """
    llm, integration = made("pal", layers=2, family="qwen3")
    llm.train()
    batches = [batch(seed) for seed in range(2)]
    expected = [step(llm, integration, *one) for one in batches]
    llm.compile(backend="eager")
    for checkpointing in (False, True):
        llm.checkpoint_gradients(checkpointing)
        for one, right in zip(batches, expected, strict=True):
            torch.testing.assert_close(step(llm, integration, *one), right, rtol=1e-5, atol=1e-5)
    assert "forward" in vars(llm.layers[0])
    llm.uncompile()
    assert "forward" not in vars(llm.layers[0])


@pytest.mark.torture
@full_only
def test_by_the_compiler_that_users_get():
    """Of a layer with audio keys."""
    llm, integration = made("lal")
    batches = [batch(seed) for seed in range(2)]
    expected = [step(llm, integration, *one) for one in batches]
    llm.compile()
    for one, right in zip(batches, expected, strict=True):
        torch.testing.assert_close(step(llm, integration, *one), right, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_trained_may_change():
    """Weights that are trained after a graph was made with them frozen get their gradients; a layer without keys."""
    llm, integration = made("plits")
    one = batch(0)
    expected = step(llm, integration, *one)
    weight = llm.layers[0].mlp.up_proj.weight
    right = weight.grad
    llm.compile(backend="aot_eager")
    llm.requires_grad_(False)
    frozen = step(llm, integration, *one)
    count = len(list(llm.parameters()))
    assert all(grad is None for grad in frozen[1 : 1 + count])
    torch.testing.assert_close(frozen[1 + count :], expected[1 + count :], rtol=1e-5, atol=1e-5)
    weight.requires_grad_(True)  # of a Linear, and of nothing else: other guards would notice a layer's own weights
    step(llm, integration, *one)
    torch.testing.assert_close(weight.grad, right, rtol=1e-5, atol=1e-5)


def test_dropout_of_adapters_ends_with_training():
    llm, integration = made("text")
    llm.add_lora(LoRA(dropout=0.9, r=2))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    one = batch(0, hears=False)
    llm.eval()
    expected = step(llm, integration, *one)[0]
    llm.compile(backend="eager")
    llm.train()
    different = {float(step(llm, integration, *one)[0]) for _ in range(3)}
    assert len(different) > 1
    llm.eval()
    torch.testing.assert_close(step(llm, integration, *one)[0], expected, rtol=1e-5, atol=1e-5)


def test_under_autocast():
    """As a GPU trains float32 weights: what is attended to is in 16 bits, in the one graph."""
    llm, integration = made("lal")
    one = batch(0)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(llm, integration, *one)[0])
        llm.compile(backend="eager")
    torch.testing.assert_close(*found)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_copy_computes_with_its_own_weights():
    llm, integration = made("text")
    one = batch(0, hears=False)
    llm.compile(backend="eager")
    step(llm, integration, *one)
    for other in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        with torch.no_grad():
            for parameter in other.layers.parameters():
                parameter.mul_(1.5)
        found = step(other, integration, *one)[0]
        other.uncompile()
        torch.testing.assert_close(found, step(other, integration, *one)[0])
        assert not torch.allclose(found, step(llm, integration, *one)[0])


def test_a_forward_of_somebody_elses_stays():
    """accelerate puts its hooks into a layer's own forward."""
    llm, integration = made("text", layers=2)
    layer, seen = llm.layers[0], []
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(1) or plain(*args, **kwargs)
    llm.compile(backend="eager")
    step(llm, integration, *batch(0, hears=False))
    llm.uncompile()
    step(llm, integration, *batch(0, hears=False))
    assert len(seen) == 2 and "forward" in vars(layer) and "forward" not in vars(llm.layers[1])
