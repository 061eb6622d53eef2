"""Thinned clips: the keys that remain are at their positions, so they are those of an audio mask on the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pal.backbone.audio_kv import AudioKV
from pal.backbone.audio_mask import TokenSpans
from pal.errors import BundleError, PalError
from pal.thinning import attention_scores, norm_scores
from pal.types import AUDIO, Tokens
from tests.backbone.generating import GREEDY
from tests.identities.models import FAMILIES, features, make_backbone, make_integration, shared
from tests.models import noise, tiny_model

NAMES = ["lal", "lal_first", "pal", "flamingo", "lal_audio_query", "lal_gated"]
SAME = {"rtol": 1e-5, "atol": 2e-5}
ROWS = [Tokens([5, 9, AUDIO, 6, 7, 8], [0]), Tokens([5, AUDIO, 3, AUDIO, 7], [1, 0]), Tokens([4, AUDIO, 2], [1])]


def scores_of(whole, seed=0):
    shape = whole.streams[0].k_LBGAC.shape
    return torch.rand(shape[0], shape[1], shape[3], generator=torch.Generator().manual_seed(seed))


def logits_of(llm, inputs):
    """Logits of the real rows."""
    return llm(inputs).logits[inputs.attention_mask_BT.bool()]


def hidden_others(inputs, whole, scores_LBA, share):
    """The context with a mask of its own for each layer, worked out here: the keys of the lowest scores are hidden."""
    (keys,) = inputs.audio_context.keys
    lengths = whole.streams[0].lengths
    parts = []
    for place, layer in enumerate(keys.layers):
        seen_BA = torch.zeros_like(keys.mask_BA)
        for row, conversation in enumerate(ROWS[: len(seen_BA)]):
            at = 0
            for clip in conversation.clips:
                own_A = scores_LBA[place, clip, : lengths[clip]].numpy()
                best = np.argsort(-own_A)[: max(1, round(share * lengths[clip]))]
                seen_BA[row, [at + int(token) for token in best]] = True
                at += lengths[clip]
        assert bool((keys.mask_BA | ~seen_BA).all())
        parts.append(replace(keys, layers=(layer,), mask_BA=seen_BA, gaps=True))
    return replace(inputs, audio_context=replace(inputs.audio_context, keys=tuple(parts)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_left_out_is_hidden(family, name):
    llm, integration = shared(family, name)
    whole = integration.index(features(13, 8), llm, "")
    scores = scores_of(whole)
    for share in (0.4, 0.01):
        thinned = whole.thin(share, [scores])
        assert thinned.streams[0].counts == tuple(max(1, round(share * n)) for n in (13, 8))
        assert thinned.streams[0].k_LBGAC.shape[3] == max(thinned.streams[0].counts)
        expected = logits_of(llm, hidden_others(integration(whole, ROWS, llm), whole, scores, share))
        found = integration(thinned, ROWS, llm)
        torch.testing.assert_close(logits_of(llm, found), expected, **SAME)
        assert torch.equal(found.position_ids_BT, integration(whole, ROWS, llm).position_ids_BT)


@pytest.mark.parametrize("name", ["lal", "pal", "flamingo"])
@torch.no_grad()
def test_answers_are_those_of_the_logits(name):
    """Prompts in a cache, padded on the left, one by one and with a shared prefix."""
    llm, integration = shared("qwen3", name)
    whole = integration.index(features(13, 8), llm, "")
    thinned = whole.thin(0.5, [scores_of(whole)])
    made = llm.generate(integration(thinned, ROWS, llm, "left"), max_new_tokens=6, **GREEDY)
    for row, said in zip(ROWS, made.tolist(), strict=True):
        ids = list(row.ids)
        for token in said:
            logits = llm(integration(thinned, [Tokens(ids, row.clips)], llm)).logits[:, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
    packed = integration(thinned, ROWS, llm, "none")
    assert torch.equal(llm.generate(packed, max_new_tokens=6, **GREEDY), made)


@torch.no_grad()
def test_all_of_it_is_the_whole():
    llm, integration = shared("llama", "pal")
    whole = integration.index(features(13, 8), llm, "")
    thinned = whole.thin(1.0)
    for name, x in whole.streams[0].tensors().items():
        if name == "rows_BSD":
            assert torch.equal(thinned.streams[0].rows_BSD, x)
    found, expected = (logits_of(llm, integration(clip, ROWS, llm)) for clip in (thinned, whole))
    torch.testing.assert_close(found, expected, **SAME)


@torch.no_grad()
def test_even_spacing_by_default_and_norms_by_scores():
    llm, integration = shared("llama", "lal")
    clip = integration.index(features(13, 8), llm, "")
    (whole,) = clip.streams
    even = clip.thin(0.5).streams[0].kept()
    for layer in whole.layers:
        # the middle of six stretches of 13 tokens, and of four of 8
        assert [kept.tolist() for kept in even[layer]] == [[1, 3, 5, 7, 9, 11], [1, 3, 5, 7]]
    for smallest in (True, False):
        (thinned,) = clip.thin(0.5, norm_scores(clip, smallest)).streams
        kept = thinned.kept()
        for place, layer in enumerate(whole.layers):
            for number, length in enumerate(whole.lengths):
                norm_A = whole.k_LBGAC[place, number, :, :length].square().sum(-1).sqrt().mean(0)
                order = np.argsort(norm_A.numpy() if smallest else -norm_A.numpy())
                expected = np.sort(order[: round(0.5 * length)])
                assert kept[layer][number].tolist() == expected.tolist()
                k, v = thinned.keys_values(layer)
                count = len(expected)
                assert torch.equal(k[number, :, :count], whole.k_LBGAC[place, number][:, expected])
                assert torch.equal(v[number, :, :count], whole.v_LBGAC[place, number][:, expected])


@torch.no_grad()
def test_thinned_clips_are_saved_rounded_taken_apart_and_joined(tmp_path):
    llm, integration = shared("llama", "pal")
    whole = integration.index(features(13, 8), llm, "d")
    thinned = whole.thin(0.5, [scores_of(whole)])
    thinned.save(tmp_path / "thin.safetensors")
    loaded = AudioKV.load(tmp_path / "thin.safetensors", "d")
    for name, x in thinned.streams[0].tensors().items():
        assert torch.equal(loaded.streams[0].tensors()[name], x)
    assert loaded.streams[0].counts == thinned.streams[0].counts == (6, 4)  # 6.5 is rounded to even
    assert thinned.nbytes < whole.nbytes
    apart = AudioKV.concat([loaded[1], loaded[0]])
    assert loaded[1].streams[0].k_LBGAC.shape[3] == 4
    swapped = [replace(row, clips=[1 - clip for clip in row.clips]) for row in ROWS]
    found, expected = (logits_of(llm, integration(*one, llm)) for one in ((apart, swapped), (thinned, ROWS)))
    torch.testing.assert_close(found, expected, **SAME)
    both = (thinned.quantized(), whole.quantized().thin(0.5, [scores_of(whole)]))
    for name, x in both[0].streams[0].tensors().items():
        assert torch.equal(both[1].streams[0].tensors()[name], x)
    by_norm = [clip.thin(0.5, norm_scores(clip)) for clip in (whole.quantized(), whole)]
    assert torch.equal(by_norm[0].streams[0].kept_LBA, by_norm[1].streams[0].kept_LBA)
    half = thinned.to("cpu", torch.float64)
    assert half.streams[0].kept_LBA.dtype == torch.int32 and half.streams[0].k_LBGAC.dtype == torch.float64
    whole.save(tmp_path / "whole.safetensors")
    assert b"pal-audio-kv-3" in (tmp_path / "whole.safetensors").read_bytes()
    assert b"pal-audio-kv-4" in (tmp_path / "thin.safetensors").read_bytes()
    (tmp_path / "thin.safetensors").write_bytes(
        (tmp_path / "thin.safetensors").read_bytes().replace(b"audio-kv-4", b"audio-kv-5")
    )
    with pytest.raises(BundleError, match="not an audio index of this version"):
        AudioKV.load(tmp_path / "thin.safetensors")


def test_what_a_thinned_clip_cannot_be():
    llm, integration = shared("llama", "lal")
    whole = integration.index(features(13, 8), llm, "")
    thinned = whole.thin(0.5)
    for action in (
        lambda: thinned.thin(0.5),
        lambda: thinned.append(thinned),
        lambda: thinned.slice(0, 0.1),
        lambda: list(thinned[0].streams[0].blocks(4)),
        lambda: AudioKV.concat([thinned, whole]),
        lambda: whole.thin(0.0),
        lambda: whole.thin(1.5),
        lambda: whole.thin(float("nan")),
        lambda: whole.thin(0.5, [torch.ones(1, 2, 3)]),
        lambda: whole.thin(0.5, []),
    ):
        with pytest.raises(PalError, match=r"thin|scores"):
            action()
    plits = shared("llama", "plits")
    clip = plits[1].index(features(13), plits[0], "")
    assert clip.thin(0.5).streams[0].kept_LBA is None  # it has no keys


@pytest.mark.parametrize("name", ["lal", "pal"])
def test_a_thinned_clip_is_asked_and_chatted_with(name):
    model = tiny_model(name)
    clip = model.index((noise(0.9, 1).numpy(), 16_000))
    same, less = clip.thin(1.0), clip.thin(0.3)
    question = ["What sound is this?", "Is it loud?"]
    assert model.ask(same, question, max_new_tokens=5) == model.ask(clip, question, max_new_tokens=5)
    answers = model.ask(less, question, max_new_tokens=5)
    assert answers == [model.ask(less, one, max_new_tokens=5) for one in question]
    assert model.chat().ask(question[0], less, max_new_tokens=5) == answers[0]


@pytest.mark.parametrize("name", ["lal", "pal", {"name": "flamingo", "every": 2}], ids=str)
def test_scores_by_a_question_are_the_attention_on_each_key(name):
    """With all but the highest score left out, the attention that is left lies on it."""
    model = tiny_model(name)
    clip = model.index((noise(0.9, 1).numpy(), 16_000))
    (scores,) = attention_scores(model, clip, "What sound is this?")
    assert scores.shape == clip.streams[0].k_LBGAC[:, :, 0, :, 0].shape
    assert bool((scores >= 0).all()) and bool((scores.sum(-1) > 0).all())
    thinned = clip.thin(0.05, [scores])  # one of 23
    assert thinned.streams[0].kept_LBA[..., 0].tolist() == scores.argmax(-1).tolist()
    with pytest.raises(PalError, match="one whole clip"):
        attention_scores(model, thinned, "What sound is this?")


def test_routes_of_their_own_have_scores_of_their_own():
    model = tiny_model(
        "pal_routed",
        encoders=[
            {"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1},
            {"name": "tiny", "width": 16, "channels": [2, 3, 4, 6], "blocks": 1},
        ],
    )
    clip = model.index((noise(0.9, 1).numpy(), 16_000))
    scores = attention_scores(model, clip, "What sound is this?")
    assert [None if one is None else tuple(one.shape) for one in scores] == [
        (len(stream.layers), 1, stream.lengths[0]) if stream.layers else None for stream in clip.streams
    ]
    assert isinstance(model.ask(clip.thin(0.5, scores), "What sound is this?", max_new_tokens=3), str)


def test_a_gate_and_its_scale_apply_to_what_is_left():
    llm = make_backbone("llama")
    integration = make_integration("lal", llm, gate=-1.5, gate_by="head")
    with torch.no_grad():
        whole = integration.index(features(13, 8), llm, "")
        scores = scores_of(whole)
        expected = logits_of(llm, hidden_others(integration(whole, ROWS, llm), whole, scores, 0.4))
        torch.testing.assert_close(logits_of(llm, integration(whole.thin(0.4, [scores]), ROWS, llm)), expected, **SAME)


def test_spans_are_those_of_the_tokens_that_are_left():
    llm, integration = shared("llama", "lal")
    with torch.no_grad():
        whole = integration.index(features(13), llm, "")
    thinned = whole.thin(0.4, [scores_of(whole)])
    inputs = integration(thinned, ROWS[:1], llm, with_spans=True)
    for keys in inputs.audio_context.keys:
        (layer,) = keys.layers
        spans: TokenSpans = keys.token_spans
        starts = thinned.streams[0].kept()[layer][0] * whole.streams[0].layout.seconds_per_token
        torch.testing.assert_close(spans.start_BX[0], torch.tensor(starts, dtype=torch.float32))
