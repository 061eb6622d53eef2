"""The gates of LAL and PAL: a bias on the scores of audio keys and rows, and positions shared with the text."""

import pytest
import torch
from transformers import DynamicCache

from pal.config import parse
from pal.errors import ConfigError
from pal.integrations.gate import RATE, ScoreGate
from pal.integrations.lal import LAL
from pal.integrations.routed import Stream
from pal.registry import build
from pal.types import AUDIO, Tokens
from tests.identities.models import E, expected_logits, features, make_backbone, shared

TEXT = [5, 6, 7, 8, 9]
WITH_CLIP = [5, 6, AUDIO, 7, 8, 9]


NAMES = ["lal", "pal", "lal_audio_query"]


def gated(llm, gate, name="lal", **options):
    torch.manual_seed(3)
    return build("integration", {"name": name, "gate": gate, "positions": "shared"} | options, in_width=E, llm=llm)


def logits_of(llm, integration, ids, side="right"):
    """Logits of the text."""
    clips = list(range(ids.count(AUDIO)))
    inputs = integration(features(9) if clips else None, [Tokens(ids, clips)], llm, side)
    logits_TV = llm(inputs).logits[0]
    return logits_TV[~inputs.audio_context.audio_rows_BT[0]] if clips else logits_TV


def logits_of_row(llm, integration, row, audio):
    """Logits of a row's text, in float64."""
    inputs = integration(audio, [row], llm)
    return llm(inputs).logits[0][~inputs.audio_context.audio_rows_BT[0]].double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@torch.no_grad()
def test_a_closed_gate_leaves_the_text_llm(family, name):
    """-1e4 is closed to the last bit of a float; -16 to what the share exp(-16) of the audio can change."""
    llm, plain = shared(family, "lal")
    text = logits_of(llm, plain, TEXT)
    torch.testing.assert_close(logits_of(llm, gated(llm, -1e4, name), WITH_CLIP), text, rtol=1e-5, atol=1e-5)
    assert (logits_of(llm, gated(llm, -16.0, name), WITH_CLIP) - text).abs().max() < 1e-3
    assert (logits_of(llm, gated(llm, 0.0, name, key_scale=1.0), WITH_CLIP) - text).abs().max() > 1e-2
    # the clip's positions alone change the text's logits
    assert (logits_of(llm, gated(llm, -1e4, name, positions="reserved"), WITH_CLIP) - text).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_open_gate_is_the_plain_form(name):
    llm, _ = shared("llama", "lal")
    torch.manual_seed(3)
    plain = build("integration", {"name": name}, in_width=E, llm=llm)
    found = logits_of(llm, gated(llm, 0.0, name, positions="reserved", key_scale=1.0), WITH_CLIP)
    torch.testing.assert_close(found, logits_of(llm, plain, WITH_CLIP), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_projectors_and_gates_learn_behind_a_closed_gate(name):
    llm = make_backbone("llama")
    integration = gated(llm, -16.0, name, gate_by="head")
    labels = [*[-100] * 5, 9]
    llm.loss(integration(features(9), [Tokens(WITH_CLIP, [0], labels)], llm))[0].backward()
    for part, weight in integration.named_parameters():
        assert weight.grad.abs().max() > 0, part
    assert integration.gate.weight_LH.grad.abs().min() > 0
    if name == "pal":
        assert integration.row_gate.weight_LH.grad.abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "ids"), [(3, [5, 6, 7, 8, AUDIO, 9, 10, 11]), (12, [5, AUDIO, 6, 7])])
def test_windows_count_positions_where_rows_share_them(tokens, ids):
    """A window of 7: eight rows at positions 0 to 6, which all see each other; seven rows at positions from -12 to 2."""
    llm, integration = shared("mistral", "pal_together")
    assert set(llm.windows) == {7}
    row, audio = Tokens(ids, [0]), features(tokens)
    found = logits_of_row(llm, integration, row, audio)
    torch.testing.assert_close(found, expected_logits(llm, integration, row, audio), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_text_after_a_clip_at_the_end_hears_nothing_either():
    """A row of a clip with a closed gate predicts nothing: the last text row is repeated."""
    llm, plain = shared("llama", "lal")
    integration = gated(llm, -1e4, "pal")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = [
        llm.generate(
            one(features(9) if AUDIO in ids else None, [Tokens(ids, [0][: ids.count(AUDIO)])], llm, "left"), **options
        )
        for one, ids in ((plain, TEXT), (integration, [*TEXT, AUDIO]))
    ]
    assert said[0].tolist() == said[1].tolist()
    inputs = integration(features(9), [Tokens([*TEXT, AUDIO], [0])], llm, "left")
    assert inputs.audio_context.repeats_BT[0].tolist() == [False] * 8 + [True]


def test_a_weight_moves_its_bias_a_hundredfold():
    llm = make_backbone("llama")
    gate = ScoreGate(LAL.Config(gate=-7.0), (1, 2), llm)
    with torch.no_grad():
        gate.weight_LH.copy_(torch.tensor([[0.02], [0.0]]))
    assert RATE == 100
    assert {layer: bias.tolist() for layer, bias in gate.bias().items()} == {1: [-5.0], 2: [-7.0]}
    with torch.no_grad():
        gate.scale_LG[1, 0] = 0.03
    scales = {layer: scale.tolist() for layer, scale in gate.scale().items()}
    assert scales == {1: pytest.approx([0.1, 0.1]), 2: pytest.approx([0.4, 0.1])}


@torch.no_grad()
def test_two_clips_share_positions_with_the_text():
    """Each clip's keys stand directly before the text that follows it."""
    llm, _ = shared("qwen3", "lal")
    integration = gated(llm, -1.0)
    row = Tokens([5, AUDIO, 6, 7, AUDIO, 8], [0, 1])
    audio = features(4, 6)
    inputs = integration(audio, [row], llm)
    assert inputs.position_ids_BT[0].tolist() == [0, 1, 2, 3]
    keys = inputs.audio_context.keys[0]
    assert keys.rope_positions_BA[0].tolist() == [-3, -2, -1, 0, *range(-3, 3)]
    torch.testing.assert_close(
        llm(inputs).logits[0].double(), expected_logits(llm, integration, row, audio), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_summaries_and_keys_share_positions_in_the_order_of_time():
    """Two groups of three tokens, each with its summary, and one of one, before the text at position 1."""
    llm, _ = shared("llama", "lal")
    inputs = gated(llm, -1.0, "pal")(features(7), [Tokens([5, AUDIO, 6], [0])], llm)
    keys = inputs.audio_context.keys[0]
    assert inputs.position_ids_BT[0].tolist() == [0, -8, -4, 0, 1]
    assert keys.rope_positions_BA[0].tolist() == [-11, -10, -9, -7, -6, -5, -3]
    assert keys.order_BA[0].tolist() == [1, 2, 3, 5, 6, 7, 9]
    assert inputs.audio_context.order_BT[0].tolist() == [0, 4, 8, 12, 13]


def test_a_gate_never_opens_at_the_start():
    with pytest.raises(ConfigError, match="gate"):
        parse(LAL.Config, {"gate": 1.0}, where="integration")


@torch.no_grad()
def test_two_streams_each_with_a_gate():
    """Generation token by token equals one forward over everything, for two streams whose biases differ."""
    llm, _ = shared("llama", "lal")
    torch.manual_seed(5)
    lal = {"name": "lal", "gate": -0.5, "gate_by": "head"}
    routed = build(
        "integration",
        {"name": "pal_routed", "routes": {}, "default": lal},
        streams=[Stream(E, ("one",)), Stream(E, ("two",))],
        llm=llm,
    )
    for number, route in enumerate(routed.routes()):
        route.gate.weight_LH.uniform_(-0.02, 0.02).add_(0.01 * number)
        route.gate.scale_LG.uniform_(0.02, 0.08)
    audio = [features(4), features(7, seed=8)]
    row = Tokens([5, AUDIO, 6, 7], [0])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        said = llm.generate(routed(audio, [row], llm, "left"), **options, **more)[0].tolist()
        if "num_beams" in more:
            beams = said
            continue
        for step, token in enumerate(said):
            whole = Tokens([*row.ids, *said[:step]], [0])
            expected = expected_logits(llm, routed, whole, audio)[-1]
            assert int(expected.argmax()) == token
    plain = llm.lm.generate(
        inputs_embeds=(inputs := routed(audio, [row], llm, "left")).inputs_embeds_BTD,
        attention_mask=inputs.attention_mask_BT,
        position_ids=inputs.position_ids_BT,
        past_key_values=DynamicCache(),
        audio_context=inputs.audio_context.prebuilt(),
        num_beams=2,
        **options,
    )
    assert beams == plain[0].tolist()
