"""Continuations that share a prompt: the answers of whole conversations, from one copy of the prompt's keys."""

from dataclasses import replace

import pytest
import torch

from pal.backbone import generate as generation
from pal.backbone import kernels
from pal.backbone.audio_mask import AudioMask
from pal.backbone.cache import JointCache
from pal.backbone.shared_prefix import Continuations
from pal.conversations import shared_prefixes
from pal.errors import PalError
from pal.types import AUDIO, IGNORE, Tokens
from tests.backbone.generating import GREEDY, Watch
from tests.identities.models import CROSSED, INTEGRATIONS, features, make_backbone, make_integration, shared

WIDE = {"mistral": {"sliding_window": 128}, "gemma3": {"sliding_window": 128}}
"""Sliding windows that do not end within the prompts."""


def questions(count, seed=0, first=(5, AUDIO, 6, AUDIO), clips=(0, 1)):
    """Conversations about the same clips, that go on in texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    texts = [torch.randint(3, 48, (length,), generator=generator).tolist() for length in lengths]
    return [Tokens([*first, *text], list(clips)) for text in texts]


def after(llm, prefixes, split, **options):
    read = llm.read_prefixes(prefixes, 20)
    return llm.generate_after(read, split.continuations, **options)


def answered(llm, integration, rows, side, audio=None, **options):
    """Answers of continuations and of whole conversations, each with the logits of all their tokens."""
    audio = features(7, 11) if audio is None else audio
    split = shared_prefixes(rows)
    found = []
    for prompts in (integration(audio, split.prefixes, llm, side), None):
        watch = Watch(read_only=True)
        asked = {"max_new_tokens": 9, **GREEDY, **options, "logits_processor": [watch]}
        if prompts is not None:
            made = after(llm, prompts, split, **asked)
        else:
            made = llm.generate(integration(audio, rows, llm, "left"), **asked)
        found.append((made, torch.stack([logits for _, logits in watch.seen])))
    return found


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("side", "family", "name"),
    [("left", *pair) for pair in CROSSED] + [("none", *pair) for pair in CROSSED if pair[0] == "llama"],
)
@torch.no_grad()
def test_continuations_get_the_answers_of_whole_conversations(family, name, side, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 3)  # so that the storage grows
    llm = make_backbone(family, **WIDE.get(family, {}))
    integration = make_integration(name, llm)
    (mine, logits), (theirs, expected) = answered(llm, integration, questions(16), side)
    assert mine.shape == (16, 9) and torch.equal(mine, theirs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_continuations_of_one_length_see_no_later_rows():
    """Without padding they need no mask."""
    llm, integration = shared("llama", "lal")
    rows = [Tokens([5, AUDIO, *text], [0]) for text in ([7, 8, 9, 10], [11, 12, 13, 14], [7, 20, 9, 21])]
    (mine, logits), (theirs, expected) = answered(llm, integration, rows, "left")
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", INTEGRATIONS)
@torch.no_grad()
def test_several_prompts_of_different_lengths_each_with_its_continuations(name):
    llm, integration = shared("llama", name)
    rows = [
        *questions(3, 1),
        *questions(1, 2, (5, AUDIO), (1,)),
        *questions(4, 3, (7, 8, 9, AUDIO, 4), (0,)),  # the 4 belongs to the rest
    ]
    assert shared_prefixes(rows).continuations.counts == (3, 1, 4)
    (mine, logits), (theirs, expected) = answered(llm, integration, rows, "left")
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_samples_of_continuations_are_those_of_whole_conversations():
    llm, integration = shared("qwen3", "pal")
    rows = questions(3, 4)
    split = shared_prefixes(rows)
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6}
    torch.manual_seed(3)
    mine = after(llm, integration(features(7, 11), split.prefixes, llm, "left"), split, **options)
    torch.manual_seed(3)
    theirs = llm.generate(integration(features(7, 11), rows, llm, "left"), **options)
    assert mine.shape == (6, 6) and torch.equal(mine, theirs)


@torch.no_grad()
def test_an_answer_ends_where_it_would_alone():
    llm, integration = shared("llama", "lal")
    (mine, _), (theirs, _) = answered(llm, integration, questions(5), "left", eos_token_id=[9, 11, 12, 13, 14, 20, 21])
    assert torch.equal(mine, theirs) and (mine == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_in_half_precision_and_under_autocast(dtype):
    llm, integration = make_backbone("llama", dtype=dtype), None
    integration = make_integration("lal", llm)
    (_, logits), (_, expected) = answered(llm, integration, questions(4), "left", max_new_tokens=1)
    torch.testing.assert_close(logits, expected, atol=0.15, rtol=0.05)
    llm, integration = shared("llama", "lal")
    with torch.autocast("cpu", dtype):
        (_, logits), (_, expected) = answered(llm, integration, questions(4), "left", max_new_tokens=1)
    torch.testing.assert_close(logits, expected, atol=0.15, rtol=0.05)


@torch.no_grad()
def test_without_the_kernel_of_cpus(monkeypatch):
    monkeypatch.setattr(kernels, "attend", kernels.attend_elsewhere)
    llm, integration = shared("qwen2", "pal_gated")
    (mine, logits), (theirs, expected) = answered(llm, integration, questions(5), "none")
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lal", "flamingo", "pal_gated"])
@torch.no_grad()
def test_a_prompts_repeated_row_needs_no_mask(name):
    """It is the last one, and no later row sees it, so it is left out."""
    llm, integration = shared("llama", name)
    split = shared_prefixes(questions(4))
    read = llm.read_prefixes(integration(features(7, 11), split.prefixes, llm, "left"), 20)
    for layer, store in enumerate(read.cache.stores):
        width, mask = read.cache.decode_mask.of_prompts(layer)
        assert width == store.prompt - 1 and (mask is None) == (name != "pal_gated")


@torch.no_grad()
def test_a_prompt_of_which_nothing_is_seen_changes_nothing():
    llm, integration = shared("llama", "plits")
    split = shared_prefixes(questions(3))
    inputs = integration(features(7, 11), split.prefixes, llm, "left", with_spans=True)
    hidden = inputs.audio_context.without(AudioMask(pathway="rows"))
    read = llm.read_prefixes(replace(inputs, audio_context=hidden), 20)
    made = llm.generate_after(read, split.continuations, max_new_tokens=4, **GREEDY)
    whole = integration(features(7, 11), questions(3), llm, "left", with_spans=True)
    expected = replace(whole, audio_context=whole.audio_context.without(AudioMask(pathway="rows")))
    assert torch.equal(made, llm.generate(expected, max_new_tokens=4, **GREEDY))


def test_labelled_batches_are_no_prompts():
    llm, integration = shared("llama", "lal")
    rows = [replace(row, labels=[IGNORE] * (len(row.ids) - 1) + row.ids[-1:]) for row in questions(4)[1:3]]
    assert all(len(row.ids) > 5 for row in rows)
    for side in ("any", "none"):
        with pytest.raises(PalError, match="laid out for training; make those of prompts without labels"):
            llm.generate(integration(features(7, 11), rows, llm, side), max_new_tokens=1)


@torch.no_grad()
def test_the_prompts_keys_are_stored_once(monkeypatch):
    llm, integration = shared("llama", "lal")
    caches = []
    begin = JointCache.begin

    def watched(self, *args):
        caches.append(self)
        begin(self, *args)

    monkeypatch.setattr(JointCache, "begin", watched)
    answered(llm, integration, questions(16), "left")
    once, each = caches
    assert {store.keys.shape[0] for store in once.stores} == {1}
    assert {store.keys.shape[0] for store in each.stores} == {16}


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"repetition_penalty": 1.2}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=str,
)
def test_options_that_only_whole_conversations_support(options):
    llm, _ = shared("llama", "lal")
    assert llm.continues(max_new_tokens=2, **GREEDY) == 2
    assert llm.continues(max_new_tokens=2, **GREEDY, **options) is None


def test_nothing_is_shared_where_a_sliding_window_ends_within_the_prefix_or_with_dropout():
    llm, integration = shared("mistral", "lal")
    split = shared_prefixes(questions(2))
    prompts = integration(features(7, 11), split.prefixes, llm, "left")
    assert llm.read_prefixes(prompts, 2) is None
    llm = make_backbone("llama", attention_dropout=0.1)
    assert llm.continues(max_new_tokens=2, **GREEDY) == 2
    llm.train()
    assert llm.continues(max_new_tokens=2, **GREEDY) is None


def test_neighbours_that_begin_alike_are_split_after_their_last_clip():
    rows = [Tokens([5, AUDIO, 6, 7], [0]), Tokens([5, AUDIO, 8], [0]), Tokens([5, AUDIO, 9], [0])]
    other = Tokens([5, AUDIO, 6], [1])
    split = shared_prefixes([*rows, other])
    assert [(one.ids, one.clips) for one in split.prefixes] == [([5, AUDIO], [0]), ([5, AUDIO], [1])]
    assert split.continuations == Continuations((3, 1), ([6, 7], [8], [9], [6]))
    assert split.continuations.prompts == [0, 0, 0, 1] and split.continuations.padding == [0, 1, 1, 1]
    assert shared_prefixes([rows[0], other]) is None  # another clip
    assert shared_prefixes([rows[0], other, rows[1], other]) is None  # no neighbours
    assert shared_prefixes([*rows[:2], other]) is None  # too little is saved
    assert shared_prefixes([rows[0], Tokens([5, AUDIO], [0])]) is None  # nothing after the clip
    assert shared_prefixes([Tokens([5, 6], []), Tokens([5, 7], [])]) is None  # no clip
    assert shared_prefixes([Tokens([AUDIO, 6], [0]), Tokens([AUDIO, 7], [0])]) is None  # no text before it


def test_rows_follow_their_prompts_positions():
    ids_RT, positions_RT = Continuations((2, 1), ([6, 7], [8], [9, 3])).rows(torch.tensor([10, 20]))
    assert ids_RT.tolist() == [[6, 7], [0, 8], [9, 3]]
    assert positions_RT.tolist() == [[11, 12], [0, 11], [21, 22]]
