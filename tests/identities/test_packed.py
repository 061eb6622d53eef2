"""Packed rows, the layout a GPU trains and reads with, equal padded ones: losses, gradients, scores."""

from dataclasses import replace

import pytest
import torch

from pal.backbone import attention, attention_metadata, packed
from pal.backbone.audio_mask import AudioMask
from pal.backbone.packed import DeviceSegments, JoinedKeys, PackedContext, PackedLayer
from pal.backbone.packed import take_rows as taken
from pal.backbone.prefill import prepared, read_prompts
from pal.backbone.segments import COPIES
from pal.backbone.varlen import segment_attention
from pal.bench.measure import saved_bytes
from pal.errors import PalError
from pal.integrations.base import Route
from pal.registry import build
from pal.types import AUDIO, IGNORE, Tokens
from tests.identities.models import CROSSED, INTEGRATIONS, PLACEMENTS, E, features, make_backbone, shared

SAME = {"rtol": 1e-5, "atol": 1e-5}
GATE = {"rtol": 2e-4, "atol": 5e-5}
"""A gate's gradient is a sum over all scores, most of which cancel."""


def labelled(ids, first, trained):
    """A conversation whose last `trained` tokens are the answer; its clips count from `first`."""
    at = [i for i, token in enumerate(ids) if token != AUDIO][-trained:]
    labels = [token if i in at else IGNORE for i, token in enumerate(ids)]
    return Tokens(list(ids), list(range(first, first + ids.count(AUDIO))), labels)


def batch(trained=2, without=()):
    rows, clips = [], 0
    for name, ids in PLACEMENTS.items():
        if name not in without:
            rows.append(labelled(ids, clips, trained))
            clips += ids.count(AUDIO)
    return features(*(2 + (7 * i) % 9 for i in range(clips))), rows


def loss_and_gradients(llm, integration, audio, rows, side):
    parameters = {f"{m}.{n}": p for m, part in (("llm", llm), ("own", integration)) for n, p in part.named_parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    audio.x_BAE.requires_grad_(True)
    inputs = integration(audio, rows, llm, side)
    total, _ = llm.loss(inputs, "answer")
    names = [*parameters, "features"]
    grads = torch.autograd.grad(total, [*parameters.values(), audio.x_BAE], allow_unused=True)
    return inputs, total.detach(), {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


@pytest.mark.parametrize(("family", "name"), CROSSED)
def test_losses_and_gradients(family, name):
    llm, integration = shared(family, name)
    windowed = any(llm.windows)
    # a row that asks again stands at a position that a key has: a window of keys is then none of positions
    audio, rows = batch(trained=1, without=("end",)) if windowed else batch()
    _, padded, expected = loss_and_gradients(llm, integration, audio, rows, "right")
    inputs, total, found = loss_and_gradients(llm, integration, audio, rows, "none")
    packs = not windowed or name in ("plits", "flamingo", "lal")
    assert isinstance(inputs.audio_context, PackedContext) or not packs
    if packs:
        assert inputs.inputs_embeds_BTD.shape[:2] == (1, sum(inputs.audio_context.lengths))
    torch.testing.assert_close(total, padded, **SAME)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], **SAME, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo"])
def test_scores_of_rows_that_share_clips(name):
    llm, integration = shared("llama", name)
    audio = features(7, 4)
    rows = [labelled([5, AUDIO, 6, 7 + i], 0, 1) for i in range(COPIES + 2)] + [labelled([AUDIO, 9, AUDIO, 8, 7], 0, 2)]
    rows = [replace(row, clips=row.clips if row.ids[0] == AUDIO else [1]) for row in rows]
    expected = llm.label_scores(integration(audio, rows, llm, "right"))
    inputs = integration(audio, rows, llm, "none")
    assert isinstance(inputs.audio_context, PackedContext)
    torch.testing.assert_close(llm.label_scores(inputs), expected, **SAME)
    _, _, right = loss_and_gradients(llm, integration, audio, rows, "right")
    _, _, found = loss_and_gradients(llm, integration, audio, rows, "none")
    for key, grad in found.items():
        torch.testing.assert_close(grad, right[key], **SAME)


@pytest.mark.parametrize("name", ["text", "plits"])
def test_equal_conversations_without_keys_take_the_llms_own_path(name):
    llm, integration = shared("qwen3", "plits")
    clip = [AUDIO] * (name == "plits")
    rows = [labelled([5, *clip, 6, 7], i, 1) for i in range(3)]
    inputs = integration(features(4, 4, 4), rows, llm, "none")
    assert inputs.inputs_embeds_BTD.shape[0] == 3 and inputs.audio_context.segments == ()
    torch.testing.assert_close(llm.loss(inputs)[0], llm.loss(integration(features(4, 4, 4), rows, llm))[0], **SAME)


def test_cudnns_attention_is_off_in_both_passes(monkeypatch):
    """A layer that is made again in the backward pass must take the kernel it took before."""
    on = []
    ours = attention.sdpa_attention_forward

    def watched(*args, **kwargs):
        on.append(torch.backends.cuda.cudnn_sdp_enabled())
        return ours(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        llm = make_backbone("llama").train()
        llm.checkpoint_gradients(True)
        integration = build("integration", INTEGRATIONS["plits"], in_width=E, llm=llm)
        rows = [labelled([5, AUDIO, 6, 7], i, 1) for i in range(2)]
        llm.loss(integration(features(4, 4), rows, llm, "none"))[0].backward()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert on == [False] * 2 * llm.n_layers


@pytest.mark.parametrize("length", [7, 8, 12])
@pytest.mark.parametrize("name", ["text", "plits"])
def test_equal_conversations_keep_a_window_that_is_shorter(name, length):
    """Windows reach over all of 7 positions, and hide the first of 8 from the last."""
    llm, integration = shared("mistral", "plits")
    assert set(llm.windows) == {7}
    ids = [5, AUDIO, *range(6, length + 2)] if name == "plits" else list(range(5, length + 5))
    rows = [labelled(ids, i, 2) for i in range(2)]
    inputs = integration(features(3, 3), rows, llm, "none")
    assert int(inputs.position_ids_BT.max()) == length - 1
    padded = integration(features(3, 3), rows, llm, "left")
    torch.testing.assert_close(llm.label_scores(inputs), llm.label_scores(padded), **SAME)
    # the last row, by which no label is predicted
    found, expected = (read_prompts(llm, prepared(llm, one), one) for one in (inputs, padded))
    torch.testing.assert_close(found, expected, **SAME)


@pytest.fixture
def kernels(monkeypatch):
    """Queries, keys and values that the variable-length kernel is given."""
    seen = []

    def noted(*given):
        seen.append(given[:3])
        return segment_attention(*given)

    monkeypatch.setattr(packed, "segment_attention", noted)
    return seen


@pytest.mark.parametrize("name", ["plits", "lal", "flamingo"])
def test_under_autocast_the_kernel_gets_half_precision(kernels, name):
    """A GPU has it for nothing else, and rotary embeddings give float32."""
    llm, integration = shared("llama", name)
    audio, rows = batch()
    with torch.autocast("cpu", torch.bfloat16):
        llm.loss(integration(audio, rows, llm, "none"))
    assert kernels and {x.dtype for given in kernels for x in given} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lal", "pal"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padded_rows_under_one_mask(family, name, monkeypatch):
    """As a GPU takes rows that are not packed."""
    llm, integration = shared(family, name)
    _, total, expected = loss_and_gradients(llm, integration, *batch(), "right")
    monkeypatch.setattr(attention_metadata, "supports_split_attention", lambda device: False)
    _, again, found = loss_and_gradients(llm, integration, *batch(), "right")
    torch.testing.assert_close(again, total, **SAME)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], **SAME)


def test_located_rows_are_never_packed():
    llm, integration = shared("llama", "lal")
    inputs = integration(features(4), [labelled([5, AUDIO, 6, 7], 0, 1)], llm, "none", with_spans=True)
    assert not isinstance(inputs.audio_context, PackedContext)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing(checkpointing):
    llm = make_backbone("llama").train()
    integration = build("integration", INTEGRATIONS["lal"], in_width=E, llm=llm)
    audio, rows = batch()
    _, total, expected = loss_and_gradients(llm, integration, audio, rows, "none")
    llm.checkpoint_gradients(checkpointing, recompute_audio=not checkpointing)
    _, again, found = loss_and_gradients(llm, integration, audio, rows, "none")
    torch.testing.assert_close(again, total)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], **SAME)


def test_projectors_activations_are_made_again():
    llm = make_backbone("llama").train()
    integration = build("integration", INTEGRATIONS["lal"], in_width=E, llm=llm)
    audio, rows = batch()
    weights = [*llm.parameters(), *integration.parameters()]
    held = []
    for again in (False, True):
        llm.checkpoint_gradients(False, recompute_audio=again)
        held.append(saved_bytes(lambda: llm.loss(integration(audio, rows, llm, "none"))[0], weights))
    assert held[1] < held[0]


class Biased(Route):
    """An integration whose audio keys have a bias on their scores."""

    def __init__(self, inner, biases):
        super().__init__()
        self.inner = inner
        self.biases = torch.nn.ParameterDict({str(layer): bias for layer, bias in biases.items()})

    def inject(self, audio, llm):
        bias = {int(layer): bias for layer, bias in self.biases.items()}
        return replace(self.inner.inject(audio, llm), bias=bias)


@pytest.mark.parametrize("each", ["layer", "head"])
@pytest.mark.parametrize("name", ["lal", "pal"])
def test_a_learned_bias_on_the_scores_of_audio(name, each, kernels):
    """None changes nothing, one far below hides all audio, and the gradient is the slope."""
    llm, inner = shared("llama", name)
    heads = llm.heads if each == "head" else 1
    assert llm.head_width % 8 == 0
    audio, rows = features(6, 3), [labelled([5, AUDIO, 6, 7], i, 1) for i in range(2)]
    plain = llm.loss(inner(audio, rows, llm, "none"))[0]
    zero = Biased(inner, {layer: torch.nn.Parameter(torch.zeros(heads)) for layer in inner.layers})
    torch.testing.assert_close(llm.loss(zero(audio, rows, llm, "none"))[0], plain, **SAME)
    far = Biased(inner, {layer: torch.nn.Parameter(torch.full((heads,), -1e4)) for layer in inner.layers})
    deaf = inner(audio, rows, llm, with_spans=True)
    deaf = replace(deaf, audio_context=deaf.audio_context.without(AudioMask(pathway="keys")))
    torch.testing.assert_close(llm.loss(far(audio, rows, llm, "none"))[0], llm.loss(deaf)[0], **SAME)

    start = torch.linspace(-1, 1, heads)
    some = Biased(inner, {layer: torch.nn.Parameter(start.clone()) for layer in inner.layers})
    llm.loss(some(audio, rows, llm, "none"))[0].backward()
    layer, step = inner.layers[0], 1e-2
    for head in range(heads):
        values = []
        for sign in (1, -1):
            moved = start.clone()
            moved[head] += sign * step
            given = {k: torch.nn.Parameter(moved if k == layer else start.clone()) for k in inner.layers}
            values.append(float(llm.loss(Biased(inner, given)(audio, rows, llm, "none"))[0].detach()))
        slope = (values[0] - values[1]) / (2 * step)
        assert some.biases[str(layer)].grad[head] == pytest.approx(slope, abs=2e-3)
    # as CUDA's kernel wants widths to be
    assert all(x.shape[-1] % 8 == 0 for given in kernels for x in given)


def test_a_bias_is_added_to_the_scaled_scores():
    torch.manual_seed(0)
    H, G, C, N, A = 4, 2, 8, 3, 5
    q, k, v = (torch.randn(1, heads, N, C) for heads in (H, G, G))
    more = (torch.randn(A, G, C), torch.randn(A, G, C))
    bias = torch.randn(H)
    still = (torch.ones(A, C), torch.zeros(A, C))  # RoPE by no angle
    order = torch.tensor([3, 4, 5, 6, 7, 0, 1, 2])  # all audio before the text
    firsts = [torch.tensor([0, size], dtype=torch.int32) for size in (N, N + A)]
    segments = DeviceSegments(*firsts, N, N + A, order, (), None, None, None)
    layer = PackedLayer(segments, None, (JoinedKeys(more, still, None, (), bias),))
    found = layer.attend(None, q, k, v, 0.3)[0]
    keys = torch.cat((more[0], k[0].transpose(0, 1))).repeat_interleave(H // G, 1)
    values = torch.cat((more[1], v[0].transpose(0, 1))).repeat_interleave(H // G, 1)
    scores = 0.3 * torch.einsum("hqc,khc->hqk", q[0], keys)
    scores[:, :, :A] += bias[:, None, None]
    unseen = torch.ones(N, N + A, dtype=torch.bool).triu(A + 1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("hqk,khc->qhc", weights, values))


def test_keys_that_stand_in_many_places_get_all_their_gradient():
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    index = torch.tensor([0, 2, 2, 0, 0])
    back = (torch.tensor([0, 5, 1]), torch.tensor([3, 5, 2]), torch.tensor([4, 5, 5]))
    grad = torch.randn(5, 2, dtype=torch.double)
    (found,) = torch.autograd.grad(taken(x, index, back), x, grad)
    (expected,) = torch.autograd.grad(x[index], x, grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(taken(x, index, ()), x, grad)[0], expected)


@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo"])
@pytest.mark.parametrize("ids", [[5, 6, AUDIO], [5, AUDIO, 6, 7]], ids=["end", "middle"])
def test_one_conversation_and_others_without_clips(name, ids):
    llm, integration = shared("llama", name)
    for rows in ([Tokens(ids, [0])], [Tokens([5, 6, 7], []), Tokens(ids, [0])]):
        options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        with torch.no_grad():
            expected = llm.generate(integration(features(5), rows, llm, "left"), **options)
            found = llm.generate(integration(features(5), rows, llm, "none"), **options)
        assert torch.equal(found, expected)


def test_one_clip_that_ends_what_is_trained():
    for name in ("plits", "pal"):
        llm, integration = shared("llama", name)
        rows = [Tokens([5, 6, 7, AUDIO], [0], [IGNORE, 6, 7, IGNORE])]
        _, expected, right = loss_and_gradients(llm, integration, features(6), rows, "right")
        _, total, found = loss_and_gradients(llm, integration, features(6), rows, "none")
        torch.testing.assert_close(total, expected, **SAME)
        for key, grad in found.items():
            torch.testing.assert_close(grad, right[key], **SAME)


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", ["lal", "pal"])
def test_any_layout_trains_where_packing_is_on(name, side):
    llm = make_backbone("llama").train()
    integration = build("integration", INTEGRATIONS[name], in_width=E, llm=llm)
    _, total, expected = loss_and_gradients(llm, integration, *batch(), side)
    llm.packs = True
    _, again, found = loss_and_gradients(llm, integration, *batch(), side)
    torch.testing.assert_close(again, total)
    assert found.keys() == expected.keys()
    llm.checkpoint_gradients(True)
    loss_and_gradients(llm, integration, *batch(), side)


def test_dropout_inside_a_projector_is_the_same_when_made_again():
    llm = make_backbone("llama", layers=1).train()
    integration = build("integration", INTEGRATIONS["lal"], in_width=E, llm=llm)
    integration.projectors["0"].insert(1, torch.nn.Dropout(0.5))
    audio, rows = batch()
    found = []
    for recomputes in (True, False):
        llm.checkpoint_gradients(False, recompute_audio=recomputes)
        torch.manual_seed(0)
        found.append(loss_and_gradients(llm, integration, audio, rows, "none")[1:])
    torch.testing.assert_close(*found)


def test_packed_rows_in_one_forward_pass():
    llm, integration = shared("llama", "lal")
    rows = [labelled([5, AUDIO, 6, 7], 0, 1), labelled([5, AUDIO, 6, 8], 1, 1)]
    with torch.no_grad():
        logits = llm(integration(features(4, 6), rows, llm, "none")).logits[0]
        padded = llm(integration(features(4, 6), rows, llm, "right")).logits
        torch.testing.assert_close(logits, padded.flatten(0, 1), **SAME)
        with pytest.raises(PalError, match="use_cache=False"):
            llm(integration(features(4, 6), rows, llm, "none"), use_cache=True)
    with pytest.raises(PalError, match="no conversation"):
        integration(features(4), [], llm)
