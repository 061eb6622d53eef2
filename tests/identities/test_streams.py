"""The identities for models with several encoders, whose streams enter by routes of their own."""

from functools import cache

import pytest
import torch

from pal.integrations.routed import Stream, build_integration
from pal.types import AUDIO, AudioFeatures, Tokens
from tests.identities.models import (
    FAMILIES,
    INTEGRATIONS,
    PLACEMENTS,
    E,
    conversation,
    expected_logits,
    features,
    make_backbone,
    opened,
    text_rows,
)

ENSEMBLES = {
    "pal_routed": {"name": "pal_routed"},
    "plits": "plits",
    "lal_some": INTEGRATIONS["lal_some"],
    "pal": INTEGRATIONS["pal"],
    "flamingo": INTEGRATIONS["flamingo"],
    "mixed": {"name": "pal_routed", "routes": {"whisper": INTEGRATIONS["pal"]}, "default": INTEGRATIONS["flamingo"]},
    "two depths": {"name": "pal_routed", "routes": {"whisper": "lal"}, "default": INTEGRATIONS["lal_some"]},
}
STREAMS = [Stream(E, ("whisper",)), Stream(E, ("sslam", "clap"))]
CUT = 6
"""Tokens of the earlier chunk, a multiple of the hybrid's stride."""

every_ensemble = pytest.mark.parametrize("name", ENSEMBLES)
some_families = pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])


@cache
def shared(family, name):
    llm = make_backbone(family)
    torch.manual_seed(3)
    return llm, opened(build_integration(ENSEMBLES[name], STREAMS, llm))


def heard(*lengths):
    """Two encoders of different rates on the same clips."""
    return [features(*lengths, seed=4), features(*(2 * n + 1 for n in lengths), seed=5)]


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@every_ensemble
@torch.no_grad()
def test_logits_equal_the_reference(family, name):
    llm, integration = shared(family, name)
    audio = heard(5, 3)
    rows = [conversation(ids) for ids in PLACEMENTS.values()]
    expected = [expected_logits(llm, integration, row, audio) for row in rows]
    table_VD = llm.embed(torch.arange(48))
    for side in ("left", "right"):
        inputs = integration(audio, rows, llm, side)
        logits_BTV = llm(inputs).logits
        for at, theirs in enumerate(expected):
            real = inputs.attention_mask_BT[at].bool()
            # text rows are those whose embedding is a token's
            text = (inputs.inputs_embeds_BTD[at][:, None] == table_VD).all(-1).any(-1)
            if inputs.audio_context is not None and inputs.audio_context.repeats_BT is not None:
                text &= ~inputs.audio_context.repeats_BT[at]
            close(logits_BTV[at][real & text].double(), theirs)


@every_ensemble
@some_families
@torch.no_grad()
def test_cached_generation_equals_one_full_forward(family, name):
    llm, integration = shared(family, name)
    audio = heard(5, 3)
    rows = [conversation(PLACEMENTS["middle"]), conversation(PLACEMENTS["two"]), conversation(PLACEMENTS["none"])]
    made = llm.generate(
        integration(audio, rows, llm),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps_BNV = torch.stack(made.logits, dim=1)
    for at, row in enumerate(rows):
        whole = integration(audio, [Tokens(row.ids + made.sequences[at].tolist(), row.clips)], llm)
        close(steps_BNV[at], llm(whole).logits[0, -10:-1])


@every_ensemble
@torch.no_grad()
def test_indexed_saved_and_appended_it_is_the_same(name, tmp_path):
    from pal.backbone.audio_kv import AudioKV

    llm, integration = shared("gemma3", name)
    audio = heard(9, 9)
    rows = [conversation(PLACEMENTS["two"], (1, 0)), conversation([5, AUDIO, 9], (1,))]
    expected = llm(integration(audio, rows, llm)).logits
    integration.index(audio, llm, "d").save(tmp_path / "kv.safetensors")
    stored = AudioKV.load(tmp_path / "kv.safetensors", "d")
    assert len(stored.streams) == 2
    close(llm(integration(stored, rows, llm)).logits, expected, 1e-5)

    def part(at):
        lengths = [tuple(len(range(n)[at]) for n in f.lengths) for f in audio]
        return [AudioFeatures(f.x_BAE[:, at], n, f.seconds_per_token) for f, n in zip(audio, lengths, strict=True)]

    both = integration.index(part(slice(0, CUT)), llm, "d").append(integration.index(part(slice(CUT, None)), llm, "d"))
    close(llm(integration(both, rows, llm)).logits, expected, 1e-5)


@every_ensemble
def test_every_weight_gets_a_gradient_with_and_without_checkpointing(name):
    torch.manual_seed(0)
    llm = make_backbone("qwen3")
    integration = opened(build_integration(ENSEMBLES[name], STREAMS, llm))
    llm.train()
    found = []
    for on in (False, True):
        llm.checkpoint_gradients(on)
        integration.zero_grad()
        row = Tokens([5, AUDIO, 6, 7, 8], [0], [-100, -100, -100, 7, 8])
        llm.loss(integration(heard(5), [row], llm))[0].backward()
        found.append({name: p.grad.clone() for name, p in integration.named_parameters()})
    for parameter, gradient in found[0].items():
        assert gradient.abs().sum() > 0, parameter
        close(found[1][parameter], gradient, 1e-5)


@torch.no_grad()
def test_untrained_flamingo_is_the_text_llm_exactly():
    llm = make_backbone("llama")
    integration = build_integration(INTEGRATIONS["flamingo"], STREAMS, llm)
    with_audio = integration(heard(5, 3), [conversation(PLACEMENTS["two"])], llm)
    without = integration(None, [Tokens([5, 6, 7, 8], [])], llm)
    assert with_audio.position_ids_BT.tolist() == without.position_ids_BT.tolist()
    assert torch.equal(llm(with_audio).logits, llm(without).logits)


@torch.no_grad()
def test_text_rows_of_one_stream_are_the_single_integrations():
    llm = make_backbone("llama")
    for name in ("plits", "lal", "pal", "flamingo"):
        torch.manual_seed(1)
        alone = opened(build_integration(INTEGRATIONS[name], STREAMS[:1], llm))
        torch.manual_seed(1)
        routed = opened(
            build_integration({"name": "pal_routed", "routes": {}, "default": INTEGRATIONS[name]}, STREAMS[:1], llm)
        )
        audio, row = features(5, 3), conversation(PLACEMENTS["two"])
        a, b = alone(audio, [row], llm), routed([audio], [row], llm)
        assert torch.equal(llm(a).logits, llm(b).logits)
        assert text_rows(llm, alone, row, a, llm(a).logits, 0).shape == (4, 48)
