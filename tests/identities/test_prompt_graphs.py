"""Prompts whose prefill is replayed get the answers that they get without, whatever was read before them."""

from threading import Thread

import pytest
import torch

from pal.backbone.packed import PackedContext
from pal.backbone.prefill import prepared, prompts_of, read_prompts
from pal.backbone.prompt_graphs import PromptGraphs
from pal.errors import PalError
from pal.integrations.filling import rounded
from pal.integrations.routed import build_integration
from pal.types import AUDIO, Tokens
from tests.backbone.generating import GREEDY, Watch
from tests.identities.models import CROSSED, PLACEMENTS, conversation, features, make_backbone, make_integration
from tests.identities.test_streams import ENSEMBLES, STREAMS
from tests.repeats import Repeats

SAME = {"rtol": 1e-4, "atol": 1e-4}
ORDERS = [("turns", "none", "before"), ("before", "turns", "none"), ("none", "before", "turns")]
"""Prompts of equal sizes together, in other orders."""
CLIPS = {"turns": (7, 11), "before": (9,), "none": ()}
"""Audio tokens of their clips."""


def model(family, name):
    llm = make_backbone(family)
    llm.packs = True
    return llm, make_integration(name, llm)


def prompts(llm, integration, names, seed=0, side="none"):
    rows, lengths = [], []
    for name in names:
        rows.append(Tokens(list(PLACEMENTS[name]), list(range(len(lengths), len(lengths) + len(CLIPS[name])))))
        lengths += CLIPS[name]
    return integration(features(*lengths, seed=seed), rows, llm, side)


def text(llm, integration, length):
    return integration(None, [Tokens(list(range(5, 5 + length)), [])], llm, "none")


def answers(llm, make, graphs, **options):
    """Tokens and logits of each step, by prompts that are made with or without graphs."""
    watch = Watch(True)
    llm.prompt_graphs = graphs
    ids = llm.generate(make(), logits_processor=[watch], max_new_tokens=6, **GREEDY, **options)
    llm.prompt_graphs = None
    return ids, torch.stack([logits for _, logits in watch.seen])


@pytest.mark.covering(1)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "name"), CROSSED)
@torch.no_grad()
def test_replayed_prompts(family, name, cache):
    llm, integration = model(family, name)
    recorder = Repeats()
    graphs = PromptGraphs(recorder)
    for seed, names in enumerate(ORDERS):

        def make(names=names, seed=seed):
            return prompts(llm, integration, names, seed)

        expected, wanted = answers(llm, make, None)
        found, logits = answers(llm, make, graphs, cache_implementation=cache)
        torch.testing.assert_close(logits, wanted, **SAME)
        assert torch.equal(found, expected)
    packed = isinstance(make().audio_context, PackedContext)
    assert graphs.failed is None
    assert recorder.replayed == (2 if packed and name != "flamingo" else 0)
    assert len(graphs) == (1 if recorder.replayed else 0)


@torch.no_grad()
def test_beams_and_samples():
    """Beam search is transformers' and reads filled prompts eagerly."""
    llm, integration = model("llama", "pal")
    recorder = Repeats()
    graphs = PromptGraphs(recorder)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        for _ in range(2):
            given = []
            for llm.prompt_graphs in (None, graphs):
                torch.manual_seed(0)
                inputs = prompts(llm, integration, ORDERS[0])
                given.append(llm.generate(inputs, max_new_tokens=6, **GREEDY | options))
            assert torch.equal(*given)
    assert recorder.replayed == 1


@torch.no_grad()
def test_lengths_that_differ_by_little_share_a_graph():
    llm, integration = model("llama", "lal")
    graphs = PromptGraphs(Repeats())
    for length in range(8, 16):
        llm.prompt_graphs = graphs
        inputs = text(llm, integration, length)
        assert inputs.inputs_embeds_BTD.shape == (1, rounded(length + 1), llm.width)
        assert inputs.audio_context.lengths == (length,) and len(inputs.audio_context.conversations) == 1
        answers(llm, lambda inputs=inputs: inputs, graphs)
    assert len(graphs) == 1


@torch.no_grad()
def test_the_graphs_that_are_kept(monkeypatch):
    """Few, by number and by the memory of what they write."""
    llm, integration = model("llama", "lal")
    lengths = (8, 16, 24, 32)
    for most, most_bytes, kept in ((2, 1 << 30, 2), (32, 1 << 30, 4), (32, 1, 1)):
        monkeypatch.setattr("pal.backbone.prompt_graphs.KEPT", most)
        monkeypatch.setattr("pal.backbone.prompt_graphs.KEPT_BYTES", most_bytes)
        graphs = PromptGraphs(Repeats())
        for length in lengths:
            for _ in range(2):
                answers(llm, lambda length=length: text(llm, integration, length), graphs)
        assert len(graphs) == kept


@pytest.mark.parametrize(
    ("name", "hooked", "side"),
    [("lal", "llm", "none"), ("lal", "projector", "none"), ("lal", None, "left"), ("flamingo", None, "none")],
)
@torch.no_grad()
def test_what_a_graph_cannot_repeat_is_read_as_written(name, hooked, side):
    recorder = Repeats()
    llm, integration = model("llama", name)
    if hooked is not None:
        (llm.layers[1].mlp if hooked == "llm" else integration.projectors.of(1)).register_forward_hook(lambda *_: None)
    graphs = PromptGraphs(recorder)
    for _ in range(3):
        answers(llm, lambda: prompts(llm, integration, ORDERS[0], side=side), graphs)
    assert recorder.recorded == 0


def test_a_model_that_trains_with_checkpointing_is_no_failure():
    """It keeps no K/V; afterwards prompts are replayed as before."""
    llm, integration = model("llama", "lal")
    llm.checkpoint_gradients(True)
    llm.train()
    graphs = PromptGraphs(Repeats())
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(PalError, match="gradient checkpointing"):
                answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)
        assert graphs.failed is None
        llm.eval()
        for _ in range(2):
            answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)
    assert len(graphs) == 1


@torch.no_grad()
def test_large_prompts_are_read_as_written(monkeypatch):
    llm, integration = model("llama", "lal")
    graphs = PromptGraphs(Repeats())
    monkeypatch.setattr("pal.backbone.prompt_graphs.LARGEST", 40)  # rows alone are fewer
    for _ in range(3):
        answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)
    assert len(graphs) == 0


@torch.no_grad()
def test_changed_weights_are_used():
    llm, integration = model("llama", "lal")
    graphs = PromptGraphs(Repeats())
    for factor in (1.0, 1.0, 1.5, 1.5):
        llm.lm.model.norm.weight.mul_(factor)  # in place: the same graph
        found = answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)[1]
        torch.testing.assert_close(found, answers(llm, lambda: prompts(llm, integration, ORDERS[0]), None)[1], **SAME)
    assert len(graphs) == 1
    llm.lm.model.norm.weight = torch.nn.Parameter(llm.lm.model.norm.weight * 1.5)  # elsewhere: another graph
    for _ in range(2):
        found = answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)[1]
        torch.testing.assert_close(found, answers(llm, lambda: prompts(llm, integration, ORDERS[0]), None)[1], **SAME)
    assert len(graphs) == 2
    for linear in (one for one in integration.modules() if isinstance(one, torch.nn.Linear)):
        linear.weight = torch.nn.Parameter(linear.weight * 1.5)
    for _ in range(2):
        found = answers(llm, lambda: prompts(llm, integration, ORDERS[0]), graphs)[1]
        torch.testing.assert_close(found, answers(llm, lambda: prompts(llm, integration, ORDERS[0]), None)[1], **SAME)
    assert len(graphs) == 3


@torch.no_grad()
def test_nothing_is_filled_up_for_no_graph():
    llm, integration = model("llama", "flamingo")
    llm.prompt_graphs = PromptGraphs(Repeats())
    inputs = prompts(llm, integration, ORDERS[0])
    assert inputs.inputs_embeds_BTD.shape[1] == sum(inputs.audio_context.lengths)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["pal_routed", "two depths"])
@torch.no_grad()
def test_several_sets_of_keys(name, cache):
    """Of different numbers, in different layers."""
    llm = make_backbone("llama")
    llm.packs = True
    torch.manual_seed(3)
    integration = build_integration(ENSEMBLES[name], STREAMS, llm)
    rows = [conversation(PLACEMENTS["two"]), conversation(PLACEMENTS["none"]), conversation(PLACEMENTS["middle"], (1,))]
    recorder = Repeats()
    graphs = PromptGraphs(recorder)
    for seed in range(3):

        def make(seed=seed):
            return integration([features(5, 3, seed=seed), features(11, 7, seed=seed)], rows, llm, "none")

        expected, wanted = answers(llm, make, None)
        found, logits = answers(llm, make, graphs, cache_implementation=cache)
        torch.testing.assert_close(logits, wanted, **SAME)
        assert torch.equal(found, expected)
    assert recorder.replayed == 2


@torch.no_grad()
def test_the_recorded_prompts_can_be_read_again():
    """Others are not copied into their tensors."""
    llm, integration = model("llama", "lal")
    graphs = PromptGraphs(Repeats())
    kept = prompts(llm, integration, ORDERS[0], seed=0)
    wanted = answers(llm, lambda: kept, None)[1]
    for inputs in (kept, kept, prompts(llm, integration, ORDERS[1], seed=1)):
        answers(llm, lambda inputs=inputs: inputs, graphs)
    torch.testing.assert_close(answers(llm, lambda: kept, None)[1], wanted, **SAME)


@torch.no_grad()
def test_indexed_clips_are_asked_by_a_graph():
    llm, integration = model("llama", "pal")
    stored = integration.index(features(9), llm, "digest")
    recorder = Repeats()
    graphs = PromptGraphs(recorder)
    for first in (5, 6, 7):

        def make(first=first):
            return integration(stored, [Tokens([first, AUDIO, 8, 9, 10], [0])], llm, "none")

        torch.testing.assert_close(answers(llm, make, graphs)[1], answers(llm, make, None)[1], **SAME)
    assert recorder.replayed == 2


def test_a_graph_serves_other_modes():
    """Its buffers outlive inference mode."""
    llm, integration = model("llama", "lal")
    graphs = PromptGraphs(Repeats())
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            for seed in range(2):
                found = answers(llm, lambda seed=seed: prompts(llm, integration, ORDERS[0], seed), graphs)[1]
                wanted = answers(llm, lambda seed=seed: prompts(llm, integration, ORDERS[0], seed), None)[1]
                torch.testing.assert_close(found, wanted, **SAME)
    assert len(graphs) == 2


@torch.no_grad()
def test_few_operations_store_the_prompts():
    """All layers' K/V at once; a GPU's host starts each operation."""
    llm, integration = model("llama", "lal")
    llm.prompt_graphs = PromptGraphs(Repeats())
    for _ in range(3):
        inputs = prompts(llm, integration, ORDERS[0])
        cache = prepared(llm, inputs)
        read_prompts(llm, cache, inputs)
    pointers = {layer.keys.untyped_storage().data_ptr() for layer in cache.stores}
    assert len(pointers) == 1 and cache.begun
    assert cache.packed is None  # freed


@torch.no_grad()
def test_a_fixed_storage_stays_where_it_is():
    """Graphs of decoding steps have its addresses."""
    llm, integration = model("llama", "lal")
    llm.prompt_graphs = PromptGraphs(Repeats())
    inputs = prompts(llm, integration, ORDERS[0])
    cache = prepared(llm, inputs, fixed=True)
    pointers = []
    for _ in range(3):
        cache.begin(inputs, prompts_of(inputs), llm.dtype)
        read_prompts(llm, cache, inputs)
        pointers.append([x.data_ptr() for layer in cache.stores for x in (layer.keys, layer.values)])
    assert len(llm.prompt_graphs) == 1 and pointers[0] == pointers[1] == pointers[2]


def test_none_without_cuda(caplog):
    llm, integration = model("llama", "lal")
    with torch.no_grad():
        for _ in range(3):
            llm.generate(prompts(llm, integration, ORDERS[0]), max_new_tokens=2, **GREEDY)
    assert len(llm.prompt_graphs) == 0 and llm.prompt_graphs.failed is None and not caplog.records
    llm.capture_prompts(False)
    assert llm.prompt_graphs is None


def test_threads_share_the_buffers():
    llm, integration = model("llama", "lal")
    wanted = [answers(llm, lambda seed=seed: prompts(llm, integration, ORDERS[0], seed), None)[1] for seed in range(4)]
    llm.prompt_graphs = PromptGraphs(Repeats())
    found = {}

    @torch.no_grad()
    def work(seed):
        for turn in range(6):
            watch = Watch(True)
            llm.generate(
                prompts(llm, integration, ORDERS[0], seed), logits_processor=[watch], max_new_tokens=6, **GREEDY
            )
            found[seed, turn] = torch.stack([logits for _, logits in watch.seen])

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for (seed, _), logits in found.items():
        torch.testing.assert_close(logits, wanted[seed], **SAME)


@torch.no_grad()
def test_logits_outlive_the_next_prompt():
    llm, integration = model("llama", "lal")
    llm.prompt_graphs = PromptGraphs(Repeats())
    found, copies = [], []
    for seed in range(4):
        inputs = prompts(llm, integration, ORDERS[0], seed)
        found.append(read_prompts(llm, prepared(llm, inputs), inputs))
        copies.append(found[-1].clone())
    for logits, copy in zip(found, copies, strict=True):
        assert torch.equal(logits, copy)
