"""Where an integration puts text, rows and keys, and what it refuses."""

import math

import pytest
import torch

from pal.backbone.stream_kv import Layout
from pal.errors import ConfigError, PromptError
from pal.integrations.routed import Stream, build_integration
from pal.registry import build, names
from pal.types import AUDIO, IGNORE, Tokens
from tests.identities.models import E, conversation, features, shared


def test_names():
    assert {"plits", "lal", "pal"} <= set(names("integration"))


def test_lal_reserves_the_positions_plits_would_fill():
    llm, lal = shared("llama", "lal")
    _, plits = shared("llama", "plits")
    row, audio = [conversation([5, 6, AUDIO, 7, AUDIO, 8])], features(3, 2)
    a, b = lal(audio, row, llm), plits(audio, row, llm)
    assert a.position_ids_BT.tolist() == [[0, 1, 5, 8]]
    assert a.audio_context.keys[0].positions_BA.tolist() == [[2, 3, 4, 6, 7]]
    assert a.audio_context.keys[0].tokens_BA.tolist() == [[0, 1, 2, 3, 4]]
    assert b.position_ids_BT.tolist() == [list(range(9))]
    assert b.audio_context is None


@pytest.mark.parametrize("tokens, keys, rows, span", [(6, [0, 1, 2, 4, 5, 6], [3, 7], 8), (4, [0, 1, 2, 4], [3, 7], 8)])
def test_the_hybrid_interleaves_tokens_and_summaries(tokens, keys, rows, span):
    llm, pal = shared("llama", "pal")
    inputs = pal(features(tokens), [conversation([5, 6, AUDIO, 7])], llm)
    assert inputs.audio_context.keys[0].positions_BA.tolist() == [[2 + offset for offset in keys]]
    assert inputs.position_ids_BT.tolist() == [[0, 1, *(2 + offset for offset in rows), 2 + span]]
    assert inputs.audio_context.audio_rows_BT.tolist() == [[False, False, True, True, False]]


def test_clips_are_those_that_rows_name_in_any_order():
    llm, lal = shared("llama", "lal")
    a = lal(features(3, 2), [Tokens([AUDIO, 5], [1]), Tokens([AUDIO, 6], [0])], llm).audio_context.keys[0]
    assert a.tokens_BA.tolist() == [[3, 4, 0], [0, 1, 2]] and a.mask_BA.sum(1).tolist() == [2, 3]
    assert (
        lal(features(3, 2), [Tokens([AUDIO, 5], [0]), Tokens([AUDIO, 6], [1])], llm).audio_context.keys[0].tokens_BA
        is None
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_stand_with_their_tokens(side):
    llm, integration = shared("llama", "pal")
    rows = [Tokens([5, AUDIO, 6, 7], [1], [IGNORE, IGNORE, IGNORE, 7]), Tokens([8, 9], [], [IGNORE, 9])]
    inputs = integration(features(9, 4), rows, llm, side)
    pad = [IGNORE] * 3
    short = [IGNORE, 9]
    assert inputs.labels_BT.tolist() == [[IGNORE] * 4 + [7], pad + short if side == "left" else short + pad]
    assert inputs.attention_mask_BT.sum(1).tolist() == [5, 2]
    table = llm.embed(torch.tensor([8, 9]))
    at = slice(3, 5) if side == "left" else slice(0, 2)
    assert torch.equal(inputs.inputs_embeds_BTD[1, at], table)


@pytest.mark.parametrize("name", ["plits", "lal", "pal"])
def test_a_conversation_that_starts_with_a_clip_can_be_trained(name):
    llm, integration = shared("llama", name)
    inputs = integration(features(3), [Tokens([AUDIO, 5, 6], [0], [IGNORE, IGNORE, 6])], llm)
    assert inputs.labels_BT.dtype == torch.long
    total, count = llm.loss(inputs)
    assert count == 1 and total > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "behind"),
    [("lal", [[0, 1, 4], [0, 1, 4, 5, 6, 8]]), ("flamingo", [[0, 1, 1], [0, 1, 1, 2, 3, 3]])],
)
def test_the_last_text_is_asked_again_behind_clips(name, behind, side):
    """Where a clip of three tokens ends the conversation; before a trained token, and behind another of two."""
    llm, integration = shared("llama", name)
    rows = [conversation([5, 6, AUDIO]), Tokens([5, 6, AUDIO, 7, 8, AUDIO], [0, 1], [IGNORE] * 3 + [7, 8, IGNORE])]
    inputs = integration(features(3, 2), rows, llm, side)
    repeats = [[False, False, True], [False, False, True, False, False, True]]
    tokens = [[5, 6, 6], [5, 6, 6, 7, 8, 8]]
    for b, real in enumerate(inputs.attention_mask_BT.bool()):
        assert inputs.position_ids_BT[b][real].tolist() == behind[b]
        assert inputs.audio_context.repeats_BT[b][real].tolist() == repeats[b]
        assert torch.equal(inputs.inputs_embeds_BTD[b][real], llm.embed(torch.tensor(tokens[b])))
    assert inputs.labels_BT[1].tolist() == [IGNORE] * 3 + [7, 8, IGNORE]
    assert not inputs.audio_context.repeats_BT[~inputs.attention_mask_BT.bool()].any()


def test_rows_without_labels_have_none():
    llm, integration = shared("llama", "lal")
    assert integration(features(2), [conversation([AUDIO, 5])], llm).labels_BT is None


def test_refusals():
    llm, integration = shared("llama", "lal")
    with pytest.raises(PromptError, match="clip 3"):
        integration(features(2), [Tokens([AUDIO, 5], [3])], llm)
    with pytest.raises(PromptError, match="clip -1"):  # which is none from the end
        integration(features(2), [Tokens([AUDIO, 5], [-1])], llm)
    with pytest.raises(PromptError, match="clip 0"):
        integration(None, [Tokens([AUDIO, 5], [0])], llm)
    with pytest.raises(PromptError, match="text"):
        integration(features(2), [Tokens([AUDIO], [0])], llm)


@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo", "lal_audio_query"])
def test_the_llm_is_no_part_of_the_integration(name):
    llm, integration = shared("llama", name)
    own = {id(p) for p in integration.parameters()}
    assert own and not own & {id(p) for p in llm.parameters()}


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("all", (0, 1, 2)),
        ("first_third", (0,)),
        ({"first": 0.5}, (0, 1)),
        ({"last": 0.3}, (2,)),
        ({"last": 1}, (0, 1, 2)),
        ({"range": [1, 3]}, (1, 2)),
        ([2, 0, 2], (0, 2)),
    ],
)
def test_layers(layers, expected):
    llm, _ = shared("llama", "lal")
    integration = build("integration", {"name": "lal", "layers": layers}, in_width=E, llm=llm)
    assert integration.layers == expected
    assert sorted(integration.projectors) == [str(layer) for layer in expected]


@pytest.mark.parametrize(
    "layers",
    [
        "some",
        [],
        [3],
        [-1],
        {"first": 0},
        {"last": 1.5},
        {"range": [2, 2]},
        {"first": 0.5, "last": 0.5},
        {"middle": 1},
        {},
    ],
)
def test_layers_that_make_no_sense_are_refused_in_one_line(layers):
    llm, _ = shared("llama", "lal")
    with pytest.raises(ConfigError) as error:
        build("integration", {"name": "lal", "layers": layers}, in_width=E, llm=llm)
    assert "\n" not in str(error.value) and "layers" in str(error.value)


def test_layout_of_a_third_of_many_layers():
    from pal.integrations.layers import share_of_layers

    assert [share_of_layers(1 / 3, total) for total in (1, 2, 3, 4, 16, 28)] == [1, 1, 1, 1, 5, 9]


def test_layout_agrees_with_the_formulas_of_the_design():
    for r in (1, 2, 3, 5):
        layout = Layout(0.04, tokens=r, rows=1)
        for A in range(1, 12):
            S = -(-A // r)
            assert layout.key_offsets(A).tolist() == [j + j // r for j in range(A)]
            assert layout.row_offsets(A).tolist() == [(i + 1) * r + i for i in range(S)]
            assert layout.reserved(A) == S * (r + 1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("pace", [1, 2, 5, 100])
def test_a_slow_clip_lies_in_fewer_positions_and_in_parts_as_whole(pace, before):
    layout = Layout(0.04, tokens=3, rows=1, beside=before, before=before, per_position=pace)
    places = 4 * 4  # of 10 tokens in groups of 3, with a summary each
    first = 50 - math.ceil(places / pace) if before else 50
    expected = [first + (j + j // 3) // pace for j in range(10)]
    assert layout.key_rope_positions(10, 50).tolist() == expected
    assert layout.row_positions(10, 50).tolist() == [first + place // pace for place in (3, 7, 11, 15)]
    assert layout.reserved(10) == (0 if before else math.ceil(places / pace))
    assert max(layout.row_positions(10, 50)) == first + math.ceil(places / pace) - 1
    if not before:  # the end of a clip that grows is not known
        assert layout.key_rope_positions(4, 50, earlier=6).tolist() == expected[6:]
        assert layout.row_positions(4, 50, earlier=6).tolist() == layout.row_positions(10, 50).tolist()[2:]


@pytest.mark.parametrize(
    "options, parameters",
    [
        ({}, E * 32 + 32 + 32 * 32 + 32),
        ({"hidden": 7}, E * 7 + 7 + 7 * 32 + 32),
        ({"depth": 3, "hidden": 7}, E * 7 + 7 + 7 * 7 + 7 + 7 * 32 + 32),
        ({"projector": "linear"}, E * 32 + 32),
        ({"projector": "low_rank", "rank": 4}, E * 4 + 4 * 32 + 32),
    ],
)
@pytest.mark.parametrize("shared_by_layers", [False, True])
def test_shapes_of_projectors(options, parameters, shared_by_layers):
    llm, _ = shared("llama", "lal")
    integration = build("integration", {"name": "lal", "shared": shared_by_layers} | options, in_width=E, llm=llm)
    layers = 1 if shared_by_layers else llm.n_layers
    assert sum(p.numel() for p in integration.parameters()) == layers * parameters


def test_options_that_a_projector_does_not_use_are_refused():
    llm, _ = shared("llama", "lal")
    for options in ({"projector": "linear", "hidden": 4}, {"rank": 4}, {"projector": "low_rank", "depth": 3}):
        with pytest.raises(ConfigError, match="not used"):
            build("integration", {"name": "lal"} | options, in_width=E, llm=llm)


def test_flamingo_needs_a_layer_to_stand_before():
    llm, _ = shared("llama", "lal")
    assert build("integration", {"name": "flamingo", "every": 3}, in_width=E, llm=llm).layers == (2,)
    with pytest.raises(ConfigError, match="every 4"):
        build("integration", {"name": "flamingo"}, in_width=E, llm=llm)


def test_each_stream_takes_the_route_of_its_encoder():
    llm, _ = shared("llama", "lal")
    streams = [Stream(E, ("whisper",)), Stream(7, ("sslam", "clap")), Stream(5, ("tiny",))]
    routed = build_integration("pal_routed", streams, llm)
    assert [type(route).__name__ for route in routed.routes()] == ["PLITS", "LAL", "LAL"]
    routes = {"clap": "pal", "tiny": {"name": "lal", "layers": [1]}}
    routed = build_integration({"name": "pal_routed", "routes": routes, "default": "plits"}, streams, llm)
    assert [type(route).__name__ for route in routed.routes()] == ["PLITS", "PAL", "LAL"]
    assert routed.routes()[2].layers == (1,)
    with pytest.raises(ConfigError, match="route of itself"):
        build_integration({"name": "pal_routed", "default": "pal_routed"}, streams, llm)
    with pytest.raises(ConfigError, match="unknown integration 'lol'"):
        build_integration({"name": "pal_routed", "default": "lol"}, streams, llm)
