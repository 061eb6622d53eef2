"""Generation: the same tokens by every cache and layout, those of forward passes and of transformers."""

import pytest
import torch

from pal.backbone import generate as generation
from pal.types import AUDIO, Tokens
from tests.backbone.generating import GREEDY, RAGGED, crossed, inputs_of, plain
from tests.identities.models import (
    features,
    make_backbone,
    make_integration,
    shared,
)


def is_greedy(llm, integration, made, rows=RAGGED):
    """Whether each token is the best of a forward pass of the whole text, without any cache."""
    for row, said in zip(rows, made.tolist(), strict=True):
        asked = frozenset([len(row.ids) - 1]) if row.ids[-1] == AUDIO else None  # what the LLM says behind a clip
        whole = integration(features(7, 11), [Tokens(row.ids + said, row.clips, predicts_after=asked)], llm)
        if llm(whole).logits[0, -len(said) - 1 : -1].argmax(-1).tolist() != said:
            return False
    return True


@pytest.mark.covering(1)
@crossed
@torch.no_grad()
def test_each_token_is_the_best_by_every_cache_and_layout(family, name, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 3)  # so that the storage grows twice
    llm, integration = shared(family, name)
    made = llm.generate(inputs_of(llm, integration), max_new_tokens=14, **GREEDY)
    assert made.shape == (4, 14) and is_greedy(llm, integration, made)
    for side in ("right", "none"):
        given = inputs_of(llm, integration, side)
        assert torch.equal(llm.generate(given, max_new_tokens=14, **GREEDY), made)
        assert torch.equal(llm.generate(given, max_new_tokens=14, cache_implementation="static", **GREEDY), made)


@pytest.mark.covering(1)
@crossed
@torch.no_grad()
def test_beams_over_one_prompt_are_beams_over_copies(family, name, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 3)
    llm, integration = shared(family, name)
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, **GREEDY, "eos_token_id": 9}
    theirs = plain(llm, inputs_of(llm, integration), **options)
    for side, cache in (("left", None), ("none", None), ("left", "static")):
        more = {} if cache is None else {"cache_implementation": cache}
        assert torch.equal(llm.generate(inputs_of(llm, integration, side), **options, **more), theirs)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "top_k": 0}], ids=str)
@pytest.mark.parametrize("family, name", [("llama", "lal"), ("gemma3", "pal"), ("mistral", "flamingo")])
def test_samples_are_those_of_transformers(family, name, options):
    llm, integration = shared(family, name)
    options = {"max_new_tokens": 9, "num_return_sequences": 3, **GREEDY, "do_sample": True, **options}
    found = []
    for more in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        found.append(llm.generate(inputs_of(llm, integration), **options, **more))
    torch.manual_seed(5)
    theirs = plain(llm, inputs_of(llm, integration), **options)
    assert theirs.shape == (12, 9)
    assert torch.equal(found[0], theirs) and torch.equal(found[1], theirs)


@pytest.mark.parametrize("name", ["lal", "flamingo"])
@torch.no_grad()
def test_compiled_layers_read_packed_prompts_and_give_the_same_tokens(name):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    llm = make_backbone("llama")
    integration = make_integration(name, llm)
    scenes = [features(audio, audio + 4) for audio in (7, 15)]
    expected = [llm.generate(integration(a, RAGGED[:2], llm, "left"), max_new_tokens=3, **GREEDY) for a in scenes]
    llm.compile(backend="eager")
    for audio in scenes:
        llm.generate(integration(audio, RAGGED[:2], llm, "none"), max_new_tokens=1, **GREEDY)
    prompts = counters["stats"]["unique_graphs"]
    for audio, tokens in zip(scenes, expected, strict=True):
        assert torch.equal(
            llm.generate(integration(audio, RAGGED[:2], llm, "none"), max_new_tokens=3, **GREEDY), tokens
        )
    assert not counters["graph_break"]
    assert 1 <= prompts <= 4
    assert counters["stats"]["unique_graphs"] == prompts  # steps have none


@pytest.mark.parametrize("name", ["plits", "lal"])
@torch.no_grad()
def test_compiled_layers_get_no_cache_of_padded_prompts(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llm = make_backbone("llama")
    integration = make_integration(name, llm)
    expected = llm.generate(inputs_of(llm, integration), max_new_tokens=5, **GREEDY)
    llm.compile(backend="eager")
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(llm.generate(inputs_of(llm, integration), max_new_tokens=5, **GREEDY, **more), expected)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_cudnn_is_off_while_a_model_runs_and_as_it_was_after():
    llm, integration = shared("llama", "lal")
    seen = []
    hook = llm.lm.model.norm.register_forward_hook(lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for on in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(on)
            with torch.no_grad():
                llm(inputs_of(llm, integration))
                plain(llm, inputs_of(llm, integration), max_new_tokens=2, **GREEDY)
            llm.generate(inputs_of(llm, integration), max_new_tokens=2, **GREEDY)
            assert torch.backends.cuda.cudnn_sdp_enabled() == on
    finally:
        hook.remove()
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen and not any(seen)
