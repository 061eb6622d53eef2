"""Decoding on a GPU: steps read nothing from the device, and CUDA graphs and their buffers are kept for like prompts."""

import copy
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pal.backbone import generate as generation
from pal.backbone import graphs
from pal.backbone.decoding import DecodingOptions, DecodingState
from pal.backbone.finetuning import LoRA
from pal.backbone.prefill import prepared, prompts_of, read_prompts
from tests.backbone.generating import GREEDY, RAGGED, Watch, inputs_of
from tests.identities.models import (
    VOCAB,
    make_backbone,
    make_integration,
    shared,
)


def ready(llm, integration, fixed, rows=RAGGED, copies=1, **options):
    inputs = inputs_of(llm, integration, rows=rows)
    cache = prepared(llm, inputs, beams=copies, room=8, fixed=fixed)
    state = DecodingState(cache, DecodingOptions(8, ends=(1,), copies=copies, **options), llm.device)
    logits_BV = read_prompts(llm, cache, inputs)
    state.begin(prompts_of(inputs).positions_BT[:, -1:].repeat_interleave(copies, dim=0))
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
    cache, decode_mask = state.cache, state.cache.decode_mask
    of = [vars(one) for one in (state, decode_mask, *decode_mask._seen, *cache.stores)]
    of += [
        dict(enumerate(x)) for x in (decode_mask.crossed, *(pair for sets in cache._crossed for pair in sets.values()))
    ]
    made = ("logits_RV", "slots_X")  # by the step itself
    found = [x for one in of for name, x in one.items() if isinstance(x, torch.Tensor) and name not in made]
    return [x.data_ptr() for x in found]


@contextmanager
def fake_capture(graph, capture_error_mode):
    stepper = fake_capture.stepper
    state = stepper.state
    graph.state, graph.lm, graph.places = state, stepper.llm.lm, places(state)
    held = [x for x in vars(state).values() if isinstance(x, torch.Tensor)] + [state.cache.decode_mask.done_1]
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
    growing = {"max_new_tokens": 20, **GREEDY}
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
    assert len(seen) == 20 and FakeGraph.made == 2 and FakeGraph.replays == replays
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
    options = {"max_new_tokens": 40, "cache_implementation": "static", **GREEDY}

    def answer(rows):
        llm.generate(inputs_of(llm, integration, rows=RAGGED[:rows]), **options)

    for rows in (1, 2, 3, 2):
        answer(rows)
    assert FakeGraph.made == 3
    assert graphs.KEPT == 2
    for rows, made in ((3, 3), (1, 4)):  # the third is kept, the first is not
        answer(rows)
        assert FakeGraph.made == made
    llm.train()
    llm.eval()
    answer(1)
    assert FakeGraph.made == 5


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
def test_kept_buffers_forget_the_prompts_before(monkeypatch):
    """Where those lay, which a window counts by, and what was stored of them, finite or not."""
    llm = make_backbone("mistral")
    integration = make_integration("lal", llm)
    options = {"max_new_tokens": 12, "cache_implementation": "static", **GREEDY}
    states, give_back = [], graphs.give_back

    def remembered(llm, plan, options, state, stepper):
        states.append(state)
        give_back(llm, plan, options, state, stepper)

    monkeypatch.setattr(graphs, "give_back", remembered)
    for rows in (RAGGED, RAGGED[::-1], RAGGED):
        watch, plain_watch = Watch(True), Watch(True)
        given = inputs_of(llm, integration, rows=rows)
        llm.generate(given, logits_processor=[watch], **options)
        llm.generate(given, logits_processor=[plain_watch], **options | {"cache_implementation": "dynamic"})
        for (_, logits), (_, wanted) in zip(watch.seen, plain_watch.seen, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert all(state is states[0] for state in states)  # used again
        for layer in states[0].cache.stores:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    llm, integration = shared("llama", "flamingo")
    options = {"max_new_tokens": 5, "cache_implementation": "static", **GREEDY}
    with torch.inference_mode():
        first = llm.generate(inputs_of(llm, integration), **options)
    assert torch.equal(llm.generate(inputs_of(llm, integration), **options), first)
