"""Options of generation: which our loop follows, which go to transformers, which are refused, and where answers end."""

import pytest
import torch
from transformers import GenerationConfig

from pal.backbone import generate as generation
from pal.backbone import graphs, prefill
from pal.backbone.decoding import options_of
from pal.backbone.prefill import read_prompts
from pal.errors import PalError
from tests.backbone.generating import GREEDY, RAGGED, Watch, inputs_of, plain
from tests.identities.models import (
    make_backbone,
    make_integration,
    shared,
)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("look", [1, 4])
def test_answers_end_as_those_of_transformers_do(cache, look, monkeypatch):
    llm, integration = shared("llama", "lal")
    inputs = inputs_of(llm, integration)
    free = llm.generate(inputs, max_new_tokens=12, **GREEDY)
    # rows end at different steps, one of them with two kinds of end
    ends = [int(free[0, 3]), int(free[1, 5])]
    options = {"max_new_tokens": 12, **GREEDY, "eos_token_id": ends, "pad_token_id": 2}
    theirs = plain(llm, inputs, **options)
    if look > 1:  # as a GPU, which is asked now and then
        monkeypatch.setattr(generation, "LOOK", look)
        monkeypatch.setattr(graphs, "possible", lambda device: True)
        monkeypatch.setattr(graphs, "WORTH", 99)
    ours = llm.generate(inputs, cache_implementation=cache, **options)
    assert torch.equal(ours, theirs)
    assert (theirs == 2).any()
    alone = inputs_of(llm, integration, rows=RAGGED[:1])
    theirs = plain(llm, alone, **options)
    assert theirs.shape[1] < 12
    assert torch.equal(llm.generate(alone, cache_implementation=cache, **options), theirs)


def test_pad_is_the_end_where_none_is_named():
    llm, integration = shared("llama", "lal")
    free = llm.generate(inputs_of(llm, integration), max_new_tokens=6, **GREEDY)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": int(free[0, 1])}
    llm.lm.generation_config.pad_token_id = None
    try:
        assert torch.equal(
            llm.generate(inputs_of(llm, integration), **options), plain(llm, inputs_of(llm, integration), **options)
        )
    finally:
        llm.lm.generation_config.pad_token_id = 0
    assert options_of(GenerationConfig(max_new_tokens=6, eos_token_id=7, pad_token_id=0), {}).pad == 0


def test_the_callers_options_stay_as_they_are():
    llm, integration = shared("llama", "lal")
    given = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0, cache_implementation="static")
    llm.generate(inputs_of(llm, integration), generation_config=given)
    assert given.cache_implementation == "static" and given.num_beams == 2


@pytest.mark.parametrize("cache", [None, "static"])
def test_who_only_watches_sees_what_a_processor_sees(cache):
    llm, integration = shared("gemma3", "pal")
    watches = [Watch(True), Watch(False)]
    for watch in watches:
        options = {"max_new_tokens": 5, "logits_processor": [watch], **GREEDY}
        llm.generate(inputs_of(llm, integration), cache_implementation=cache, **options)
    first, second = (watch.seen for watch in watches)
    assert len(first) == len(second) == 5
    for (said, logits), (theirs, wanted) in zip(first, second, strict=True):
        assert torch.equal(said, theirs)
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_our_loop_takes_what_it_follows_and_nothing_else(monkeypatch):
    llm, integration = shared("llama", "lal")
    inputs = inputs_of(llm, integration)
    calls = []
    theirs = type(llm.lm).generate
    monkeypatch.setattr(type(llm.lm), "generate", lambda self, **more: calls.append(1) or theirs(self, **more))

    def by_theirs(**options):
        calls.clear()
        llm.generate(inputs, **{"max_new_tokens": 2, **GREEDY, **options})
        return bool(calls)

    assert not by_theirs()
    assert not by_theirs(do_sample=True, temperature=0.5, top_k=3, top_p=0.9)
    assert not by_theirs(repetition_penalty=1.0, num_beams=1, use_cache=True, return_dict_in_generate=False)
    assert not by_theirs(generation_config=GenerationConfig(max_new_tokens=3))
    for options in (
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"forced_eos_token_id": 0},
        {"max_time": 0.0},
        {"min_new_tokens": 2},
        {"no_repeat_ngram_size": 2},
        {"output_logits": True, "return_dict_in_generate": True},
        {"logits_processor": [lambda said, logits: logits]},
        {"generation_config": GenerationConfig(repetition_penalty=1.2, max_new_tokens=2)},
        {"prefix_allowed_tokens_fn": lambda row, said: [5]},
    ):
        assert by_theirs(**options), options
    monkeypatch.setattr(llm.lm.generation_config, "repetition_penalty", 1.1)
    assert by_theirs()


def test_a_processor_changes_what_is_said():
    llm, integration = shared("llama", "lal")
    made = llm.generate(
        inputs_of(llm, integration), max_new_tokens=4, prefix_allowed_tokens_fn=lambda row, said: [7], **GREEDY
    )
    assert made.tolist() == [[7] * 4] * 4


def test_text_alone_without_our_attention_function_is_transformers_own():
    llm = make_backbone("llama")
    integration = make_integration("plits", llm)
    inputs = inputs_of(llm, integration)
    expected = llm.generate(inputs, max_new_tokens=6, **GREEDY)
    llm.lm.set_attn_implementation("sdpa")
    for options in ({}, {"num_beams": 1, "cache_implementation": "dynamic"}):
        assert torch.equal(llm.generate(inputs, max_new_tokens=6, **options, **GREEDY), expected)


def test_other_static_caches_are_refused_with_audio():
    llm, integration = shared("llama", "lal")
    with pytest.raises(PalError, match=r"this cache cannot be used with audio; .*'static'"):
        llm.generate(inputs_of(llm, integration), max_new_tokens=2, cache_implementation="offloaded_static", **GREEDY)


def test_packed_prompts_are_asked_for_only_where_they_can_be_used(monkeypatch):
    llm, integration = shared("llama", "lal")
    assert llm.prompt_side() == "left"
    monkeypatch.setattr(llm, "_packs", True)
    assert llm.prompt_side(max_new_tokens=3) == llm.prompt_side(num_beams=2, cache_implementation="static") == "none"
    assert llm.prompt_side(use_cache=False) == llm.prompt_side(cache_implementation="offloaded") == "left"
    with pytest.raises(PalError, match="padding_side='left'"):
        llm.generate(inputs_of(llm, integration, "none"), max_new_tokens=2, use_cache=False)


def test_a_cache_that_the_llm_drops_is_said():
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    llm.checkpoint_gradients(True)
    llm.train()
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(PalError, match="gradient checkpointing; call eval"):
            llm.generate(inputs_of(llm, integration), max_new_tokens=2, **options)
    llm.eval()
    assert llm.generate(inputs_of(llm, integration), max_new_tokens=2, **GREEDY).shape == (4, 2)


def test_a_cache_takes_one_row_a_step():
    llm, integration = shared("llama", "lal")
    inputs = inputs_of(llm, integration)
    cache = prefill.prepared(llm, inputs)
    read_prompts(llm, cache, inputs)
    with pytest.raises(PalError, match=r"one row more of each of 4, got position_ids of shape \(4, 2\)"):
        llm.lm(input_ids=torch.ones(4, 2, dtype=torch.long), position_ids=torch.ones(4, 2), past_key_values=cache)
    with pytest.raises(PalError, match="needs position_ids"):
        llm.lm(input_ids=torch.ones(4, 1, dtype=torch.long), past_key_values=cache)
