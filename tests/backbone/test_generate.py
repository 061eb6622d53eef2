"""Generation: the same tokens by every cache, layout and loop, and nothing read from the device while they are made."""

import copy
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig

from pal.backbone import generate as generation
from pal.backbone import graphs, reading
from pal.backbone.decoding import Decoding, Options, options_of
from pal.backbone.finetuning import LoRA
from pal.backbone.generate import padded_left
from pal.backbone.reading import prepared, prompts_of, read_prompts
from pal.errors import PalError
from pal.types import AUDIO, Tokens
from tests.identities.models import (
    INTEGRATIONS,
    PLACEMENTS,
    VOCAB,
    conversation,
    features,
    make_backbone,
    make_integration,
    shared,
)

OURS = ("llama", "qwen3", "gemma3", "mistral")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RAGGED = [
    conversation(PLACEMENTS["turns"]),
    conversation([5, AUDIO, 9], (1,)),
    conversation(PLACEMENTS["none"]),
    conversation(PLACEMENTS["end"]),
]
every_integration = pytest.mark.parametrize("name", INTEGRATIONS)
every_family = pytest.mark.parametrize("family", OURS)


def inputs_of(llm, integration, side="left", rows=RAGGED):
    return integration(features(7, 11), rows, llm, side)


def plain(llm, inputs, **options):
    """transformers' loop and cache, the layers hearing by attention to several sets of keys: what was done before."""
    inputs = padded_left(inputs)
    audio = {} if inputs.audio is None else {"audio": inputs.audio.prebuilt()}
    return llm.lm.generate(
        inputs_embeds=inputs.inputs_embeds_BTD,
        attention_mask=inputs.attention_mask_BT,
        position_ids=inputs.position_ids_BT,
        past_key_values=DynamicCache(),
        **audio,
        **options,
    )


def is_greedy(llm, integration, made, rows=RAGGED):
    """Whether each token is the best of a forward pass of the whole text, without any cache."""
    for row, said in zip(rows, made.tolist(), strict=True):
        asked = frozenset([len(row.ids) - 1]) if row.ids[-1] == AUDIO else None  # what the LLM says behind a clip
        whole = integration(features(7, 11), [Tokens(row.ids + said, row.clips, asked=asked)], llm)
        if llm(whole).logits[0, -len(said) - 1 : -1].argmax(-1).tolist() != said:
            return False
    return True


@every_integration
@every_family
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


@every_integration
@every_family
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


class Watch:
    """Only looks, or says that it does not."""

    def __init__(self, only_watches):
        self.only_watches = only_watches
        self.seen = []

    def __call__(self, said, logits):
        self.seen.append((said.clone(), logits.clone()))
        return logits


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


# What runs on a GPU


def ready(llm, integration, fixed, rows=RAGGED, copies=1, **options):
    inputs = inputs_of(llm, integration, rows=rows)
    cache = prepared(llm, inputs, beams=copies, room=8, fixed=fixed)
    state = Decoding(cache, Options(8, ends=(1,), copies=copies, **options), llm.device)
    logits_BV = read_prompts(llm, cache, inputs)
    state.begin(prompts_of(inputs).positions_BT[:, -1:])
    state.choose(logits_BV.repeat_interleave(copies, dim=0))
    return state


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("family, name", [("llama", "lal_first"), ("gemma3", "pal"), ("llama", "flamingo")])
@torch.no_grad()
def test_a_step_reads_nothing_from_the_device(family, name, fixed):
    llm, integration = shared(family, name)
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    states = [
        ready(llm, integration, fixed),
        ready(llm, integration, fixed, copies=2, warpers=((TopKLogitsWarper, 5), (TopPLogitsWarper, 0.9))),
    ]
    mode = FakeTensorMode()
    for state in states:
        with FakeCopyMode(mode):
            lm, fake = copy.deepcopy((llm.lm, state))
        with mode:
            for _ in range(3):
                fake.step(lm)  # a look at a value would raise
        assert fake.said_RN.shape == state.said_RN.shape


class FakeGraph:
    """A CUDA graph on the CPU: what is captured does not happen, and happens again at each replay."""

    made = 0
    replays = 0

    def __init__(self):
        FakeGraph.made += 1

    def replay(self):
        FakeGraph.replays += 1
        assert places(self.state) == self.places
        self.state.step(self.lm)
        self.logits.copy_(self.state.logits_RV)


def places(state):
    """Where all that a step reads and writes lies, as a graph knows it."""
    cache, sight = state.cache, state.cache.sight
    of = [vars(one) for one in (state, sight, *sight._seen, *cache.stores)]
    of += [dict(enumerate(x)) for x in (sight.crossed, *(pair for sets in cache._crossed for pair in sets.values()))]
    made = ("logits_RV", "slots_X")  # by the step itself
    found = [x for one in of for name, x in one.items() if isinstance(x, torch.Tensor) and name not in made]
    return [x.data_ptr() for x in found]


@contextmanager
def fake_capture(graph, capture_error_mode):
    stepper = fake_capture.stepper
    state = stepper.state
    graph.state, graph.lm, graph.places = state, stepper.llm.lm, places(state)
    held = [x for x in vars(state).values() if isinstance(x, torch.Tensor)] + [state.cache.sight.done_1]
    held += [x for layer in state.cache.stores for x in (layer.keys, layer.values)]
    before = [x.clone() for x in held]
    yield
    graph.logits = state.logits_RV
    for x, old in zip(held, before, strict=True):
        x.copy_(old)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that has graphs."""
    FakeGraph.made = 0
    init = graphs.Stepper.__init__

    def remembered(self, *given):
        init(self, *given)
        fake_capture.stepper = self

    monkeypatch.setattr(graphs.Stepper, "__init__", remembered)
    monkeypatch.setattr(graphs, "possible", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: type("S", (), {"wait_stream": lambda self, other: None})())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextmanager(lambda: (yield))())
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)


@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo"])
@torch.no_grad()
def test_a_graph_is_made_once_and_gives_the_same_tokens(gpu, name):
    llm = make_backbone("llama")
    integration = make_integration(name, llm)
    growing = {"max_new_tokens": 40, **GREEDY}
    options = {**growing, "cache_implementation": "static"}
    for rows in (RAGGED, [RAGGED[1], *RAGGED[:3]]):  # of like length: one plan
        watch, plain_watch = Watch(True), Watch(True)
        given = inputs_of(llm, integration, rows=rows)
        ours = llm.generate(given, logits_processor=[watch], **options)
        theirs = llm.generate(given, logits_processor=[plain_watch], **growing)
        assert torch.equal(ours, theirs)
        for (_, logits), (_, wanted) in zip(watch.seen, plain_watch.seen, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert FakeGraph.made == 1
    # weights in other places, hooks, adapters: not the same step any more
    llm.lm.model.norm.weight = torch.nn.Parameter(llm.lm.model.norm.weight * 1.5)
    given = inputs_of(llm, integration)
    changed = llm.generate(given, **options)
    assert FakeGraph.made == 2
    assert torch.equal(changed, llm.generate(given, **growing))
    seen = []
    hook = llm.lm.model.norm.register_forward_hook(lambda *given: seen.append(1))
    replays = FakeGraph.replays
    llm.generate(given, **options)
    hook.remove()
    assert len(seen) == 40 and FakeGraph.made == 2 and FakeGraph.replays == replays
    llm.add_lora(LoRA(r=2))
    llm.eval()
    llm.generate(given, **options)
    assert FakeGraph.made == 3
    for module in llm.lm.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    llm.generate(given, **options)
    assert FakeGraph.made == 4


@torch.no_grad()
def test_under_autocast_no_graph_is_made(gpu):
    llm, integration = shared("llama", "lal")
    with torch.autocast("cpu", torch.bfloat16):
        given = inputs_of(llm, integration)
        ids = llm.generate(given, max_new_tokens=40, cache_implementation="static", **GREEDY)
    assert ids.shape == (4, 40) and FakeGraph.made == 0


@torch.no_grad()
def test_dropout_is_drawn_anew_at_each_step(gpu):
    llm = make_backbone("llama", attention_dropout=0.5).train()
    integration = make_integration("lal", llm)
    options = {"max_new_tokens": 40, "cache_implementation": "static", **GREEDY}
    assert llm.generate(inputs_of(llm, integration), **options).shape == (4, 40)
    assert FakeGraph.made == 0
    llm.eval().generate(inputs_of(llm, integration), **options)
    assert FakeGraph.made == 1


@pytest.mark.parametrize("cache, every", [("static", generation.LOOK), ("dynamic", generation.LOOK // 4)])
@torch.no_grad()
def test_the_host_asks_now_and_then_whether_all_have_ended(gpu, cache, every):
    llm, integration = shared("llama", "lal")
    reads = []
    for tokens in (16, 48):
        options = {"max_new_tokens": tokens, "cache_implementation": cache, "do_sample": False, "pad_token_id": 0}
        with Reads() as found:
            llm.generate(inputs_of(llm, integration), eos_token_id=[VOCAB - 1], **options)
        reads.append(found.count)
    assert reads[1] - reads[0] == (48 - 16) // every


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_few_buffers_are_kept_and_none_while_training(gpu):
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    for rows in (1, 2, 3, 2):
        llm.generate(
            inputs_of(llm, integration, rows=RAGGED[:rows]), max_new_tokens=40, cache_implementation="static", **GREEDY
        )
    assert FakeGraph.made == 3
    assert len(graphs._kept[llm]) == graphs.KEPT
    llm.train()
    assert llm not in graphs._kept


@torch.no_grad()
def test_short_answers_and_growing_caches_get_no_graph(gpu):
    llm, integration = shared("llama", "lal")
    llm.generate(inputs_of(llm, integration), max_new_tokens=6, cache_implementation="static", **GREEDY)
    llm.generate(inputs_of(llm, integration), max_new_tokens=40, **GREEDY)
    llm.generate(inputs_of(llm, integration), max_new_tokens=40, cache_implementation="dynamic", **GREEDY)
    assert FakeGraph.made == 0


def test_two_threads_have_buffers_of_their_own():
    llm, integration = shared("llama", "lal")
    options = {"max_new_tokens": 20, "cache_implementation": "static", **GREEDY}
    scenes = [inputs_of(llm, integration, rows=rows) for rows in (RAGGED, RAGGED[::-1])]
    expected = [llm.generate(scene, **options) for scene in scenes]
    found = {}
    threads = [
        Thread(target=lambda i=i: found.__setitem__(i, [llm.generate(scenes[i], **options) for _ in range(3)]))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made, expected[i]) for i in range(2) for made in found[i])


@torch.no_grad()
def test_kept_buffers_forget_the_prompts_before():
    """Where those lay, which a window counts by, and what was stored of them, finite or not."""
    llm = make_backbone("mistral")
    integration = make_integration("lal", llm)
    options = {"max_new_tokens": 12, "cache_implementation": "static", **GREEDY}
    for rows in (RAGGED, RAGGED[::-1], RAGGED):
        watch, plain_watch = Watch(True), Watch(True)
        given = inputs_of(llm, integration, rows=rows)
        llm.generate(given, logits_processor=[watch], **options)
        llm.generate(given, logits_processor=[plain_watch], **options | {"cache_implementation": "dynamic"})
        for (_, logits), (_, wanted) in zip(watch.seen, plain_watch.seen, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        (kept,) = graphs._kept[llm].values()
        for layer in kept.state.cache.stores:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    llm, integration = shared("llama", "flamingo")
    options = {"max_new_tokens": 5, "cache_implementation": "static", **GREEDY}
    with torch.inference_mode():
        first = llm.generate(inputs_of(llm, integration), **options)
    assert torch.equal(llm.generate(inputs_of(llm, integration), **options), first)


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


def test_a_cache_takes_one_row_a_step():
    llm, integration = shared("llama", "lal")
    inputs = inputs_of(llm, integration)
    cache = reading.prepared(llm, inputs)
    read_prompts(llm, cache, inputs)
    with pytest.raises(PalError, match=r"one row more of each of 4, got position_ids of shape \(4, 2\)"):
        llm.lm(input_ids=torch.ones(4, 2, dtype=torch.long), position_ids=torch.ones(4, 2), past_key_values=cache)
    with pytest.raises(PalError, match="needs position_ids"):
        llm.lm(input_ids=torch.ones(4, 1, dtype=torch.long), past_key_values=cache)
