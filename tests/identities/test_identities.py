"""The ten identities of the design, in its order; test_reference.py holds what they stand on."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from pal.backbone.audio_mask import AudioMask
from pal.backbone.finetuning import LoRA
from pal.errors import PalError
from pal.types import AUDIO, AudioFeatures, Tokens
from tests.identities.models import (
    CROSSED,
    FAMILIES,
    INTEGRATIONS,
    PLACEMENTS,
    conversation,
    expected_logits,
    features,
    make_backbone,
    make_integration,
    shared,
    text_rows,
)

FAST = ["llama", "mistral", "gemma3"]
"""Families for the costlier identities: plain, windows everywhere, windows and two rotary embeddings."""

every_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", FAST)
every_integration = pytest.mark.parametrize("name", INTEGRATIONS)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# 1


@cache
def plain_model(family):
    llm, _ = shared(family, "plits")
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(llm.lm.config), attn_implementation="sdpa").eval()
    plain.load_state_dict(llm.lm.state_dict())
    return plain


@pytest.mark.covering(2)
@both_sides
@every_integration
@every_family
@torch.no_grad()
def test_1_without_audio_logits_equal_the_plain_model_exactly(family, name, side):
    llm, integration = shared(family, name)
    plain = plain_model(family)
    rows = [Tokens([5, 6, 7, 8, 9, 10, 11, 12, 13], []), Tokens([5, 6, 7], [])]
    for batch in (rows, rows[:1]):
        inputs = integration(None, batch, llm, side)
        assert inputs.audio_context is None
        ids_BT = torch.zeros(inputs.position_ids_BT.shape, dtype=torch.long)
        ids_BT[inputs.attention_mask_BT.bool()] = torch.tensor([token for row in batch for token in row.ids])
        real = inputs.attention_mask_BT.bool()
        theirs = plain(
            input_ids=ids_BT, attention_mask=inputs.attention_mask_BT, position_ids=inputs.position_ids_BT
        ).logits
        assert torch.equal(llm(inputs).logits[real], theirs[real])


# 2


@every_family
@torch.no_grad()
def test_2_with_one_layer_and_the_same_projector_lal_equals_plits(family):
    row, audio = [conversation(PLACEMENTS["two"])], features(4, 6)
    for layers in (1, 3):
        llm = make_backbone(family, layers)
        plits, lal = make_integration("plits", llm), make_integration("lal", llm)
        for projector in lal.projectors.values():
            projector.load_state_dict(plits.projector.state_dict())
        a, b = plits(audio, row, llm), lal(audio, row, llm)
        a = text_rows(llm, plits, row[0], a, llm(a).logits, 0)
        b = text_rows(llm, lal, row[0], b, llm(b).logits, 0)
        if layers == 1:
            close(a, b)
        else:
            assert (a - b).abs().max() > 1e-2


@every_family
@torch.no_grad()
def test_2_audio_queries_without_feed_forward_networks_are_plits(family):
    # the clip comes first: audio queries do not see text before it, rows of PLITS do
    llm = make_backbone(family)
    for parameter_name, parameter in llm.named_parameters():
        if "down_proj" in parameter_name:
            parameter.zero_()
    plits, queries = make_integration("plits", llm), make_integration("lal_audio_query", llm)
    queries.projector.load_state_dict(plits.projector.state_dict())
    row, audio = [conversation([AUDIO, 5, 6, 7])], features(6)
    a, b = plits(audio, row, llm), queries(audio, row, llm)
    close(text_rows(llm, plits, row[0], a, llm(a).logits, 0), text_rows(llm, queries, row[0], b, llm(b).logits, 0))


# 3


@pytest.mark.covering(1)
@both_sides
@every_integration
@every_family
@torch.no_grad()
def test_3_text_before_the_audio_does_not_change_with_it(family, name, side):
    llm, integration = shared(family, name)
    rows = [conversation(PLACEMENTS["middle"]), conversation(PLACEMENTS["none"])]
    logits = []
    for seed in (2, 3):
        inputs = integration(features(7, 11, seed=seed), rows, llm, side)
        logits.append(text_rows(llm, integration, rows[0], inputs, llm(inputs).logits, 0))
    assert torch.equal(logits[0][:3], logits[1][:3])
    assert (logits[0][3:] - logits[1][3:]).abs().amax(-1).min() > 1e-3


# 4


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_4_a_padded_batch_equals_its_items(family, name):
    llm, integration = shared(family, name)
    rows = [conversation(ids, clips=(1, 0)) for ids in PLACEMENTS.values()] + [conversation([5, AUDIO, 9], (2,))]
    lengths = (7, 11, 1)
    audio = features(*lengths)
    sides = [integration(audio, rows, llm, side) for side in ("left", "right")]
    together = [llm(inputs).logits for inputs in sides]
    for at, row in enumerate(rows):
        alone = Tokens(row.ids, list(range(len(row.clips))))
        clips = [audio.x_BAE[clip, : lengths[clip]] for clip in row.clips]
        own = None
        if clips:
            width = max(len(x) for x in clips)
            x_BAE = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, width - len(x))) for x in clips])
            own = AudioFeatures(x_BAE, tuple(len(x) for x in clips), 0.04)
        single = llm(integration(own, [alone], llm)).logits[0]
        for inputs, logits_BTV in zip(sides, together, strict=True):
            close(logits_BTV[at][inputs.attention_mask_BT[at].bool()], single)


@pytest.mark.covering(1)
@every_integration
@some_families
def test_4_beams_of_a_batch_equal_beams_of_its_items(family, name):
    llm, integration = shared(family, name)
    audio = features(7, 11)
    rows = [conversation(PLACEMENTS["turns"]), conversation([5, AUDIO, 9], (1,)), conversation(PLACEMENTS["none"])]
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "num_return_sequences": 2, "eos_token_id": None}
    singly = [llm.generate(integration(audio, [row], llm), **options) for row in rows]
    for side in ("left", "right"):
        together = llm.generate(integration(audio, rows, llm, side), **options)
        assert together.tolist() == torch.cat(singly).tolist()


@pytest.mark.covering(1)
@both_sides
@every_integration
@every_family
@torch.no_grad()
def test_4_sets_of_keys_apart_equal_all_keys_under_one_mask(family, name, side, monkeypatch):
    llm, integration = shared(family, name)
    rows = [conversation(ids) for ids in PLACEMENTS.values()]
    inputs = integration(features(7, 11, 5, 9), [rows[0], rows[5], rows[6], rows[4]], llm, side)
    apart = llm(inputs).logits
    monkeypatch.setattr(llm, "dropout", 0.5)  # only the latter has dropout
    real = inputs.attention_mask_BT.bool()
    close(apart[real], llm(inputs).logits[real])


# 5


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_5_cached_generation_equals_one_full_forward(family, name):
    llm, integration = shared(family, name)
    # each integration and family with either side of the other
    side = ["left", "right"][([*FAMILIES].index(family) + [*INTEGRATIONS].index(name)) % 2]
    audio = features(7, 11)
    rows = [conversation(PLACEMENTS["middle"]), conversation(PLACEMENTS["two"]), conversation(PLACEMENTS["none"])]
    inputs = integration(audio, rows, llm, side)
    made = llm.generate(
        inputs,
        max_new_tokens=9,  # more than the windows
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps_BNV = torch.stack(made.logits, dim=1)
    for at, row in enumerate(rows):
        whole = integration(audio, [Tokens(row.ids + made.sequences[at].tolist(), row.clips)], llm)
        close(steps_BNV[at], llm(whole).logits[0, -10:-1])


@pytest.mark.covering(1)
@pytest.mark.parametrize(("family", "name"), CROSSED)
@torch.no_grad()
def test_5_a_row_without_padding_too(family, name):
    # generate drops a mask of ones, from which transformers would infer packed sequences
    llm, integration = shared(family, name)
    audio, row = features(7), conversation(PLACEMENTS["middle"])
    made = llm.generate(integration(audio, [row], llm), max_new_tokens=9, do_sample=False, eos_token_id=None)
    whole = integration(audio, [Tokens(row.ids + made[0].tolist(), row.clips)], llm)
    assert made[0].tolist() == llm(whole).logits[0, -10:-1].argmax(-1).tolist()


# 6


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_6_indexed_audio_equals_audio_in_place(family, name):
    llm, integration = shared(family, name)
    audio = features(7, 11)
    rows = [conversation(ids) for ids in PLACEMENTS.values()]
    stored = integration.index(audio, llm, "digest")
    for given in (stored, [stored[0], stored[1]]):
        close(llm(integration(given, rows, llm)).logits, llm(integration(audio, rows, llm)).logits, 1e-5)


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_6_two_chunks_appended_equal_one_shot_at_any_offset(family, name):
    llm, integration = shared(family, name)
    audio = features(6, 6, garbage=False)
    early = AudioFeatures(audio.x_BAE[:, :3], (3, 3), 0.04)
    # the later chunks differ in length, so the joined clips do
    late = AudioFeatures(audio.x_BAE[:, 3:], (3, 1), 0.04)
    if name in (
        "lal_audio_query",
        "query_gated",
    ):  # its later tokens are made from the earlier ones, which a chunk does not have
        with pytest.raises(PalError, match="index it whole"):
            integration.index(early, llm, "d").append(integration.index(late, llm, "d"))
        return
    both = integration.index(early, llm, "d").append(integration.index(late, llm, "d"))
    assert both.streams[0].lengths == (6, 4)
    whole = AudioFeatures(audio.x_BAE, (6, 4), 0.04)
    for ids in ([AUDIO, 5, 6], [5] * 9 + [AUDIO, 5, 6], [5, AUDIO, 6, AUDIO, 7]):
        rows = [conversation(ids), conversation(ids, (1, 0))]
        close(llm(integration(both, rows, llm)).logits, llm(integration(whole, rows, llm)).logits, 1e-5)


@every_family
@torch.no_grad()
def test_6_keys_rotated_later_equal_keys_made_there(family):
    llm, integration = shared(family, "lal")
    audio = features(5)
    stored = integration.index(audio, llm, "d")
    rows = [conversation([6] * 20 + [AUDIO, 5])]
    context = integration(audio, rows, llm).audio_context
    for layer in range(3):
        u_BAD = integration.projectors.of(layer)(audio.x_BAE)
        k_BGAC, v_BGAC = llm.project_kv(layer, u_BAD)
        torch.testing.assert_close(stored.streams[0].keys_values(layer), (k_BGAC, v_BGAC))
        cos, sin = llm.rope(torch.arange(20, 25)[None])[llm.layer_types[layer]]
        half = llm.head_width // 2
        turned = torch.cat([-k_BGAC[..., half:], k_BGAC[..., :half]], -1)
        built = context.prebuilt().keys[0].built[layer]
        torch.testing.assert_close(built[0], k_BGAC * cos[:, None] + turned * sin[:, None])


# 7


@every_family
@torch.no_grad()
def test_7_the_hybrid_with_one_pathway_masked_equals_the_other(family):
    llm, integration = shared(family, "pal")
    audio = features(7, 11)
    rows = [*map(conversation, PLACEMENTS.values()), conversation([7, AUDIO, 3, 4, 5, 6, 8, 9], (1,))]
    for masked, keys, summary in (("keys", False, True), ("rows", True, False)):
        expected = [expected_logits(llm, integration, row, audio, keys=keys, rows=summary) for row in rows]
        for side in ("left", "right"):
            inputs = integration(audio, rows, llm, side)
            audio_context = inputs.audio_context.without(AudioMask(pathway=masked))
            logits_BTV = llm(replace(inputs, audio_context=audio_context)).logits
            assert logits_BTV.isfinite().all()
            for at, (row, theirs) in enumerate(zip(rows, expected, strict=True)):
                close(text_rows(llm, integration, row, inputs, logits_BTV, at).double(), theirs)


@torch.no_grad()
def test_7_masked_pathways_stay_masked_while_generating():
    llm, integration = shared("mistral", "pal")
    audio, row = features(7), conversation(PLACEMENTS["middle"])
    inputs = integration(audio, [row], llm)
    for masked in ("keys", "rows"):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        made = llm.generate(
            replace(inputs, audio_context=inputs.audio_context.without(AudioMask(pathway=masked))),
            **options,
            output_logits=True,
            return_dict_in_generate=True,
        )
        full = Tokens(row.ids + made.sequences[0].tolist(), row.clips)
        theirs = expected_logits(llm, integration, full, audio, keys=masked != "keys", rows=masked != "rows")
        close(torch.stack(made.logits, 1)[0].double(), theirs[-7:-1])


# 8 and 9


def labelled():
    rows = [
        Tokens([5, AUDIO, 6, 7, 8], [0], [-100, -100, -100, 7, 8]),
        Tokens([5, AUDIO, AUDIO, 8, 9], [1, 0], [-100, -100, -100, -100, 9]),
        Tokens([5, 6, 7], [], [-100, -100, 7]),
    ]
    return features(5, 8), rows


def gradients(llm, integration):
    audio, rows = labelled()
    llm.zero_grad(), integration.zero_grad()
    total, tokens = llm.loss(integration(audio, rows, llm))
    assert tokens == 4
    total.backward()
    named = [*llm.named_parameters(), *integration.named_parameters()]
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


@pytest.mark.covering(1)
@pytest.mark.parametrize(("family", "name"), CROSSED)
def test_8_checkpointing_leaves_the_gradients_as_they_are(family, name):
    llm = make_backbone(family)
    integration = make_integration(name, llm)
    llm.train()
    ran = []
    for layer in llm.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: ran.append(module))
    llm.checkpoint_gradients(False, recompute_audio=False)
    plain = gradients(llm, integration)
    assert len(ran) == 3
    for layers, audio in ((True, False), (False, True)):
        ran.clear()
        llm.checkpoint_gradients(layers, recompute_audio=audio)
        recomputed = gradients(llm, integration)
        assert len(ran) == (6 if layers else 3)  # each again in the backward pass, or else none
        assert plain.keys() == recomputed.keys()
        for parameter, gradient in plain.items():
            close(recomputed[parameter], gradient, 1e-5)
        for parameter, _ in integration.named_parameters():
            assert recomputed[parameter].abs().sum() > 0, parameter


TRAINED = [
    (family, name, what)
    for family in FAST
    for name in INTEGRATIONS
    for what in ("full", "no_ffn", "attention", "lora", "none")
    if what == "full" or family == "llama" or name == "lal"
]
"""All weights everywhere; some, with each integration and with each family."""


@pytest.mark.covering(2)
@pytest.mark.parametrize(("family", "name", "what"), TRAINED)
def test_9_what_is_trained_gets_a_gradient_and_nothing_else_does(family, name, what):
    llm = make_backbone(family)
    integration = make_integration(name, llm)
    if what == "lora":
        llm.add_lora(LoRA(r=2, dropout=0.0))
        with torch.no_grad():  # adapters start at zero, where their first half gets no gradient
            for parameter_name, parameter in llm.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_()
    chosen = {id(parameter) for parameter in llm.train_only(what)}
    assert bool(chosen) == (what != "none")
    found = gradients(llm, integration)
    for parameter_name, parameter in llm.named_parameters():
        assert parameter.requires_grad == (id(parameter) in chosen)
        assert (found[parameter_name] is not None and bool(found[parameter_name].any())) == parameter.requires_grad
    for parameter_name, _ in integration.named_parameters():
        assert found[parameter_name].any(), parameter_name
    if what in ("attention", "no_ffn"):
        assert not any("mlp" in n for n, p in llm.named_parameters() if p.requires_grad)


# 10


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_10_silence_the_right_clip_and_a_swapped_one_differ(family, name):
    llm, integration = shared(family, name)
    clips = features(8, 8)
    silence = AudioFeatures(torch.zeros(2, 8, clips.x_BAE.shape[2]), clips.lengths, 0.04)
    ids = PLACEMENTS["middle"]
    cases = [(clips, (0,)), (clips, (1,)), (silence, (0,))]
    last = [llm(integration(audio, [conversation(ids, which)], llm)).logits[0, -1] for audio, which in cases]
    for i in range(3):
        for j in range(i):
            assert (last[i] - last[j]).abs().max() > 1e-2, (i, j)
