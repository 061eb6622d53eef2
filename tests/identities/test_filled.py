"""Batches filled up to sizes that come back, and training steps that are repeated for them: values and gradients."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pal.backbone.finetuning import LoRA
from pal.backbone.loss_graphs import LossGraphs
from pal.backbone.packed import PackedContext
from pal.backbone.segments import Conversation, segments_of, widened
from pal.integrations.filling import rounded
from pal.registry import build
from pal.types import AUDIO, IGNORE
from tests.backbone.test_segments import conversations, seen_in_segments
from tests.counts import full_only
from tests.identities.models import CROSSED, INTEGRATIONS, PLACEMENTS, E, features, make_backbone
from tests.identities.test_packed import GATE, SAME, labelled
from tests.repeats import Repeats

WRITTEN = ("flamingo", "lal_audio_query", "query_gated")
"""Integrations that have graphs make nothing for: their keys are not made in the layers."""


def model(family, name):
    """An LLM and an integration of their own, which train and repeat."""
    torch.manual_seed(0)
    llm = make_backbone(family).train()
    llm.packs = True
    integration = build("integration", INTEGRATIONS[name], in_width=E, llm=llm)
    for parameter in (*llm.parameters(), *integration.parameters()):
        parameter.requires_grad_(True)
    return llm, integration


def batches(count, without=(), seed=0):
    """Ragged ones, of all placements of clips in another order."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        rows, clips = [], 0
        for name in rng.permutation([name for name in PLACEMENTS if name not in without]):
            ids = [*PLACEMENTS[name], *range(5, 5 + int(rng.integers(0, 4)))]
            rows.append(labelled(ids, clips, int(rng.integers(1, 3))))
            clips += ids.count(AUDIO)
        yield features(*rng.integers(1, 12, clips).tolist()), rows


def gradients(llm, integration, audio, rows, per="token", times=1.0):
    """Loss, count and the gradients that are left on the weights and the features."""
    parameters = dict([*llm.named_parameters("llm"), *integration.named_parameters("own")])
    for parameter in parameters.values():
        parameter.grad = None
    audio.x_BAE.grad = None
    audio.x_BAE.requires_grad_(True)
    total, items = llm.loss(integration(audio, rows, llm, "none"), per)
    (total * times).backward()
    found = {name: parameter.grad for name, parameter in parameters.items()} | {"features": audio.x_BAE.grad}
    return total.detach(), items, {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.covering(1)
@pytest.mark.parametrize(("family", "name"), CROSSED)
def test_filling_changes_nothing(family, name):
    llm, integration = model(family, name)
    without = ("end",) if any(llm.windows) else ()
    for per, (audio, rows) in zip(("token", "answer"), batches(2, without), strict=True):
        llm.capture(False)
        total, items, expected = gradients(llm, integration, audio, rows, per)
        llm.loss_graphs = LossGraphs(Repeats())
        inputs = integration(audio, rows, llm, "none")
        if isinstance(inputs.audio_context, PackedContext) and name in WRITTEN:
            assert inputs.inputs_embeds_BTD.shape[1] == sum(inputs.audio_context.lengths)
            assert len(inputs.targets.rows_N) == sum(inputs.targets.lengths)  # nothing is filled up for no graph
        elif isinstance(inputs.audio_context, PackedContext):
            assert inputs.inputs_embeds_BTD.shape[1] == rounded(inputs.inputs_embeds_BTD.shape[1])
            assert len(inputs.targets.rows_N) == rounded(sum(inputs.targets.lengths))
            assert (inputs.labels_BT != IGNORE).sum() == sum(label != IGNORE for row in rows for label in row.labels)
        filled, count, found = gradients(llm, integration, audio, rows, per)
        assert count == items
        torch.testing.assert_close(filled, total, **SAME)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            same = GATE if "gate" in key else SAME
            torch.testing.assert_close(grad, expected[key], **same, msg=lambda text, key=key: f"{key}: {text}")


VARIANTS = ("lal_first", "lal_some", "lal_shared", "pal_slow", "pal_together", "query_gated")
"""What differs from others in numbers alone."""


@pytest.mark.torture
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(pytest.param("llama", name, marks=[full_only] if name in VARIANTS else []) for name in INTEGRATIONS),
        ("gemma", "lal"),  # whose head is tied to its embeddings
    ],
)
def test_repeated_steps(family, name):
    """Each of several batches, some of one size, gives what it gives by itself, whatever was before it."""
    llm, integration = model(family, name)
    plain = deepcopy((llm, integration))
    plain[0].packs = True
    recorder = Repeats()
    llm.loss_graphs = LossGraphs(recorder)
    one, other = batches(2, seed=3)
    for turn, (audio, rows) in enumerate([one, one, other, one, other]):
        with torch.no_grad():  # as a step of training would leave them
            for mine, theirs in zip(llm.parameters(), plain[0].parameters(), strict=True):
                mine.mul_(1.01)
                theirs.mul_(1.01)
            audio.x_BAE.copy_(torch.randn_like(audio.x_BAE))
        expected_total, _, expected = gradients(*plain, audio, rows, times=0.5)
        total, _, found = gradients(llm, integration, audio, rows, times=0.5)
        torch.testing.assert_close(total, expected_total, **SAME)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            about, same = f"{turn} {key}: ", GATE if "gate" in key else SAME
            torch.testing.assert_close(grad, expected[key], **same, msg=lambda text, about=about: about + text)
    assert llm.loss_graphs.failed is None
    assert (len(llm.loss_graphs), recorder.replayed > 0) == ((0, False) if name in WRITTEN else (2, True))


def weights_behind(x):
    """Names of the leaves whose gradients a tensor's graph makes."""
    todo, seen = [x.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


@pytest.mark.parametrize(("family", "name"), [("llama", "lal"), ("gemma", "lal"), ("gemma", "pal")])
def test_a_graph_is_recorded_apart_from_what_made_its_inputs(family, name):
    """Autograd ties a leaf's node to the stream it is made on, and CUDA refuses to record a node of another stream."""

    class Watching(Repeats):
        def record(self, run):
            total = run.__self__._total
            if total is not None:
                inside.append(weights_behind(total))
            return super().record(run)

    llm, integration = model(family, name)
    llm.loss_graphs = LossGraphs(Watching())
    ((audio, rows),) = batches(1)
    inside, outside = [], set()
    for _ in range(2):
        inputs = integration(audio, rows, llm, "none")
        outside |= weights_behind(inputs.inputs_embeds_BTD)
        llm.loss(inputs)[0].backward()
    assert len(inside) == 1 and len(inside[0]) > 10 and outside
    assert not inside[0] & outside


def test_parts_of_a_step_add_up():
    llm, integration = model("llama", "lal")
    llm.loss_graphs = LossGraphs(Repeats())
    ((audio, rows),) = batches(1)
    for _ in range(2):
        _, _, expected = gradients(llm, integration, audio, rows)
    assert len(llm.loss_graphs) == 1
    for parameter in llm.parameters():
        parameter.grad = None
    for times in (0.5, 2.0, 3.0):
        (times * llm.loss(integration(audio, rows, llm, "none"))[0]).backward()
    for name, parameter in llm.named_parameters("llm"):
        torch.testing.assert_close(parameter.grad, 5.5 * expected[name], **SAME)


def test_a_loss_whose_gradients_are_still_to_come_keeps_the_graphs_to_itself():
    llm, integration = model("llama", "lal")
    recorder = Repeats()
    llm.loss_graphs = LossGraphs(recorder)
    ((audio, rows),) = batches(1)
    _, _, one = gradients(llm, integration, audio, rows)
    gradients(llm, integration, audio, rows)
    for parameter in llm.parameters():
        parameter.grad = None
    losses = [llm.loss(integration(audio, rows, llm, "none"))[0] for _ in range(2)]
    replayed = recorder.replayed
    sum(losses).backward()
    assert recorder.replayed == replayed + 1  # the backward pass of the first
    for name, parameter in llm.named_parameters("llm"):
        torch.testing.assert_close(parameter.grad, 2 * one[name], **SAME)
    del losses
    llm.loss(integration(audio, rows, llm, "none"))
    assert recorder.replayed == replayed + 2  # a loss that nobody asks any more blocks nothing
    llm.loss(integration(audio, rows, llm, "none"))
    assert recorder.replayed == replayed + 3


def with_hook(llm, integration):
    llm.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_dropout(llm, integration):
    llm.add_lora(LoRA(r=2, dropout=0.5))


def with_checkpointing(llm, integration):
    llm.checkpoint_gradients(True)


def with_a_head_of_another_kind(llm, integration):
    head = llm.lm.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.weight = llm.lm.get_input_embeddings().weight


def with_gradient_hook(llm, integration):
    next(llm.parameters()).register_post_accumulate_grad_hook(lambda _: None)


def with_earlier_gradient_hook(llm, integration):
    next(llm.parameters()).register_hook(lambda _: None)


CHANGES = [
    *(with_hook, with_dropout, with_checkpointing, with_a_head_of_another_kind),
    *(with_gradient_hook, with_earlier_gradient_hook),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_cannot_repeat_is_run_as_written(change):
    llm, integration = model("llama", "lal")
    change(llm, integration)
    llm.loss_graphs = LossGraphs(Repeats())
    ((audio, rows),) = batches(1)
    for _ in range(3):
        gradients(llm, integration, audio, rows)
    assert len(llm.loss_graphs) == 0


def test_other_settings_are_other_graphs():
    """What is trained, in what precision, and with which weights."""
    llm, integration = model("llama", "lal")
    recorder = Repeats()
    llm.loss_graphs = LossGraphs(recorder)
    ((audio, rows),) = batches(1)

    def steps():
        recorder.recorded = 0
        for _ in range(3):
            found = gradients(llm, integration, audio, rows)[2]
        return recorder.recorded, found

    assert steps()[0] == 2
    llm.lm.requires_grad_(False)
    count, found = steps()
    assert count == 2 and not any(name.startswith("llm.") for name in found)
    with torch.autocast("cpu", torch.bfloat16):
        assert steps()[0] == 2
    llm.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(40, 32), requires_grad=False)
    assert steps()[0] == 2
    assert steps()[0] == 0
    copy = deepcopy(llm)
    assert copy.loss_graphs is not llm.loss_graphs and len(copy.loss_graphs) == 0


def test_a_failure_to_record_is_said_once_and_training_goes_on(caplog):
    class Broken(Repeats):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    llm, integration = model("llama", "lal")
    ((audio, rows),) = batches(1)
    expected = gradients(llm, integration, audio, rows)[2]
    llm.loss_graphs = LossGraphs(Broken())
    for _ in range(4):
        found = gradients(llm, integration, audio, rows)[2]
        torch.testing.assert_close(found["features"], expected["features"], **SAME)
    assert [record.message for record in caplog.records] == [
        "running on without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert not llm.captures(True)


@given(
    talks=st.lists(conversations(), min_size=1, max_size=4), window=st.sampled_from([None, 4]), rows=st.integers(1, 5)
)
def test_widened_segments_show_the_same(talks, window, rows):
    """Of all conversations but the last, of text alone, which takes what is added."""
    text = np.arange(rows)
    last = Conversation(text, text >= 0, text < 0, (text[:0],), text, (text[:0],), text - rows - 1)
    segments = segments_of([*talks, last], [0], window)
    if segments is None:
        return
    wide = widened(segments, rounded)
    sources = sum(len(one.positions_T) + len(one.keys[0]) for one in (*talks, last))
    shown, expected = (seen_in_segments(one, sources, window)[: -rows or None] for one in (wide, segments))
    np.testing.assert_array_equal(shown, expected)
    assert (np.diff(wide.cu_seqlens_q) >= 0).all() and (np.diff(wide.cu_seqlens_k) >= 0).all()
    assert len(wide.cu_seqlens_q) - 1 == rounded(len(segments.cu_seqlens_q) - 1)
    if wide.keys_K is not None:
        assert len(wide.keys_K) == wide.cu_seqlens_k[-1] == rounded(len(wide.keys_K))
        assert len(wide.back) == len(segments.back)
        for places, before in zip(wide.back, segments.back, strict=True):
            stands = places < len(wide.keys_K)
            np.testing.assert_array_equal(stands, before < len(segments.keys_K))
            np.testing.assert_array_equal(wide.keys_K[places[stands]], np.flatnonzero(stands))
    if wide.queries_Q is not None:
        assert len(wide.queries_Q) == wide.cu_seqlens_q[-1] == rounded(len(wide.queries_Q))
        assert not wide.unused_Q[wide.outs_N].any() and wide.unused_Q.sum() == len(wide.unused_Q) - len(wide.outs_N)
        np.testing.assert_array_equal(wide.queries_Q[wide.outs_N], np.arange(len(wide.outs_N)))


@given(st.integers(1, 100_000))
def test_sizes(count):
    size = rounded(count)
    assert count <= size < count + max(8, count / 16) and rounded(size) == size
    sizes = {rounded(n) for n in range(count, 2 * count + 1, max(1, count // 64))}
    assert len(sizes) <= 18
