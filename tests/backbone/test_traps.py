"""One regression test per known trap of the seam with transformers."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from pal.backbone.attention import NAME
from pal.backbone.audio_mask import AudioMask
from pal.errors import PalError
from pal.types import AUDIO, Tokens
from tests.identities.models import (
    PLACEMENTS,
    conversation,
    expected_logits,
    features,
    make_backbone,
    make_integration,
    shared,
    text_rows,
)


def middle(name="lal", family="llama"):
    llm, integration = shared(family, name)
    return llm, integration(features(7), [conversation(PLACEMENTS["middle"])], llm)


class Calls(TorchDispatchMode):
    """Records shapes of queries and keys, and of the mask, of every attention kernel that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            mask = (kwargs or {}).get("attn_mask")
            self.seen.append((tuple(args[0].shape), tuple(args[1].shape), None if mask is None else tuple(mask.shape)))
        return func(*args, **(kwargs or {}))


def test_the_mask_function_is_registered_too():
    assert NAME in AttentionInterface().valid_keys()
    assert NAME in AttentionMaskInterface().valid_keys()


@torch.no_grad()
def test_layers_without_audio_stay_causal():
    # the causal mask would be dropped without the mask function; layers 1 and 2 use transformers' own mask
    llm, integration = shared("llama", "lal_first")
    logits = [
        llm(integration(features(7), [conversation([5, AUDIO, 6, 7, last])], llm)).logits[0, :3] for last in (8, 9)
    ]
    assert torch.equal(*logits)


def test_the_name_triggers_no_capability_check():
    assert not any(word in NAME for word in ("sdpa", "flash", "flex_attention"))


@pytest.mark.parametrize("missing", ["attention_mask", "position_ids"])
def test_a_missing_mask_or_position_ids_raises(missing):
    llm, inputs = middle()
    given = {"attention_mask": inputs.attention_mask_BT, "position_ids": inputs.position_ids_BT, missing: None}
    with pytest.raises(PalError, match=missing):
        llm.lm(inputs_embeds=inputs.inputs_embeds_BTD, audio_context=inputs.audio_context, **given)


def test_a_mask_of_another_shape_raises():
    _, inputs = middle()
    mask_BT, positions_BT = inputs.attention_mask_BT, inputs.position_ids_BT
    with pytest.raises(PalError, match="2-D"):
        inputs.audio_context.attention_metadata(mask_BT[:, None, None], positions_BT)
    with pytest.raises(PalError, match="does not fit"):
        inputs.audio_context.attention_metadata(mask_BT, positions_BT.repeat(2, 1))


def test_audio_past_the_view_raises():
    llm, inputs = middle()
    with pytest.raises(PalError, match="Backbone"):
        llm.lm.model(
            inputs_embeds=inputs.inputs_embeds_BTD,
            attention_mask=inputs.attention_mask_BT,
            position_ids=inputs.position_ids_BT,
            audio_context=inputs.audio_context,
        )


def test_another_attention_function_raises_instead_of_being_deaf():
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    inputs = integration(features(7), [conversation(PLACEMENTS["middle"])], llm)
    llm.lm.set_attn_implementation("sdpa")
    with pytest.raises(PalError, match="ignores audio"):
        llm(inputs)


@torch.no_grad()
def test_a_gap_in_the_positions_is_not_taken_for_packed_sequences():
    # without padding, where transformers would be tempted: the question still sees the system prompt
    llm, integration = shared("llama", "lal_first")
    logits = [
        llm(integration(features(7), [conversation([first, 6, AUDIO, 7, 8])], llm)).logits[0, -1] for first in (5, 9)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("name", ["lal", "lal_first"])
@torch.no_grad()
def test_windows_count_positions_in_layers_without_audio_too(family, name):
    # 7 audio positions between lie outside every window, though only two rows do
    llm, integration = shared(family, name)
    row, audio = conversation([5, 6, AUDIO, 7, 8]), features(7)
    inputs = integration(audio, [row], llm)
    ours = text_rows(llm, integration, row, inputs, llm(inputs).logits, 0)
    torch.testing.assert_close(ours.double(), expected_logits(llm, integration, row, audio), atol=1e-4, rtol=1e-4)
    if family == "mistral" and name == "lal_first":
        deaf = llm(replace(inputs, audio_context=inputs.audio_context.without(AudioMask(pathway="keys")))).logits
        other = integration(audio, [conversation([9, 10, AUDIO, 7, 8])], llm)
        # nothing else reaches the last rows, neither directly nor over the rows between
        assert torch.equal(
            deaf[0, 2:],
            llm(replace(other, audio_context=other.audio_context.without(AudioMask(pathway="keys")))).logits[0, 2:],
        )


@pytest.mark.parametrize(("family", "window"), [("mistral", 7), ("gemma3", 6)])
@pytest.mark.parametrize("name", ["lal", "lal_first", "pal", "plits"])
@torch.no_grad()
def test_a_window_as_long_as_the_last_position_leaves_the_first_row_out(family, window, name):
    llm, integration = shared(family, name)
    audio = features(3)
    # a clip of three tokens takes three positions, or four with its summary
    before = window - 1 - (4 if name == "pal" else 3)
    row = conversation([*[5, 6, 9][:before], AUDIO, 7, 8])
    for last in (window - 1, window):
        inputs = integration(audio, [row], llm)
        assert int(inputs.position_ids_BT.max()) == window
        cut = Tokens(row.ids[:-1] if last < window else row.ids, row.clips)
        inputs = integration(audio, [cut], llm)
        assert int(inputs.position_ids_BT.max()) == last
        ours = text_rows(llm, integration, cut, inputs, llm(inputs).logits, 0)
        torch.testing.assert_close(ours.double(), expected_logits(llm, integration, cut, audio), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_keeps_the_gap():
    llm, inputs = middle("lal")
    seen = []
    hook = llm.lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    llm.generate(inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    hook.remove()
    assert seen == [[0, 1, 2, 10, 11, 12], [13], [14]]


@pytest.mark.parametrize("name", ["plits", "lal", "pal"])
def test_heads_are_not_repeated(name):
    llm, integration = shared("llama", name)
    rows = [conversation(PLACEMENTS["middle"]), conversation(PLACEMENTS["none"])]
    for side in ("left", "right"):
        with Calls() as calls, torch.no_grad():
            llm(integration(features(7, 11), rows, llm, side))
        assert calls.seen and all(keys[1] == 2 for _, keys, _ in calls.seen)


def test_no_mask_of_all_keys():
    """Text is causal; rows after the audio see all of it, those before it none: nothing is left to say."""
    llm, integration = shared("llama", "lal")
    with Calls() as calls, torch.no_grad():
        llm(integration(features(40), [conversation(PLACEMENTS["middle"])], llm))
    # three queries lie after the audio; with two heads to a group they make six
    assert calls.seen == [((1, 4, 6, 8), (1, 2, 6, 8), None), ((1, 2, 6, 8), (1, 2, 40, 8), None)] * 3


@torch.no_grad()
def test_grouping_by_laying_queries_in_a_row_equals_repeating_heads():
    # what runs where the masked kernel knows no groups, tried here on the CPU
    from pal.backbone.attention import folded_attention

    torch.manual_seed(0)
    for Q in (1, 5):
        q, k, v = torch.randn(2, 6, Q, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
        mask = torch.rand(2, 1, Q, 9) > 0.3
        theirs = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
        )
        torch.testing.assert_close(folded_attention(q, k, v, mask, 0.0, 0.3), theirs)


def test_audio_is_projected_once_for_all_steps_and_beams_of_generate():
    llm, integration = shared("llama", "lal")
    shapes = []
    hooks = [
        p.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape[0]))
        for p in integration.projectors.values()
    ]
    rows = [conversation(PLACEMENTS["middle"])] * 2
    llm.generate(integration(features(7), rows, llm), max_new_tokens=4, num_beams=3, eos_token_id=None)
    for hook in hooks:
        hook.remove()
    assert shapes == [1, 1, 1]  # once a layer, one clip, though two rows and six beams hear it


def test_generate_refuses_unknown_arguments_still():
    llm, inputs = middle()
    with pytest.raises(ValueError, match="nonsense"):
        llm.generate(inputs, max_new_tokens=1, nonsense=inputs.audio_context)


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
@torch.no_grad()
def test_gemma_embeddings_are_scaled_once(family):
    llm, _ = shared(family, "lal")
    table = llm.lm.state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(llm.embed(torch.tensor([5])), table[5:6] * 32**0.5)


def test_checkpointing_drops_no_audio(caplog):
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    llm.train().checkpoint_gradients(True)
    row = [Tokens([5, AUDIO, 6, 7], [0], [-100, -100, 6, 7])]
    with caplog.at_level(logging.WARNING):
        inputs = integration(features(4), row, llm)
        heard = llm(inputs, use_cache=True).logits  # transformers drops the cache here
        deaf = llm(
            replace(inputs, audio_context=inputs.audio_context.without(AudioMask(pathway="keys"))), use_cache=True
        ).logits
    assert (heard - deaf).abs().max() > 1e-2


def test_checkpointing_recomputes_audio_in_its_layer():
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    llm.train().checkpoint_gradients(True)
    order = []
    for layer, projector in integration.projectors.items():
        projector.register_forward_hook(lambda m, args, out, layer=layer: order.append(layer))
    row = [Tokens([5, AUDIO, 6, 7], [0], [-100, -100, 6, 7])]
    total, _ = llm.loss(integration(features(4), row, llm))
    assert order == ["0", "1", "2"]
    total.backward()
    assert order == ["0", "1", "2", "2", "1", "0"]


def test_layers_with_and_without_audio_look_at_their_own():
    llm, inputs = middle("lal_some")
    with Calls() as calls, torch.no_grad():
        llm(inputs)
    # six rows of text, and seven tokens of audio in the first layer and the last
    assert [keys[2] for _, keys, _ in calls.seen] == [6, 7, 6, 6, 7]


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "phi3"}, "phi3"),
        ({"model_type": "smollm3"}, "smollm3"),
        ({"model_type": "gemma3"}, "gemma3_text"),
        ({}, "None"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_unsupported_models_are_refused_by_name(fields, word):
    from pal.backbone.llm import Backbone

    with pytest.raises(PalError, match=word) as error:
        Backbone.load(fields)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_folder_of_a_backbone_is_a_plain_transformers_model(tmp_path):
    from pal.backbone.llm import Backbone

    llm, _ = shared("qwen3", "lal")
    llm.lm.save_pretrained(tmp_path)
    again = Backbone.load(tmp_path).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain).__name__ == type(llm.lm).__name__ == "Qwen3ForCausalLM"
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(plain(ids).logits, llm.lm(ids).logits)
    assert torch.equal(again.lm(ids).logits, llm.lm(ids).logits)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from pal.backbone.llm import Backbone

    llm, _ = shared("llama", "lal")
    llm.lm.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PalError, match=r"layers\.1\.mlp\.up_proj"):
        Backbone.load(tmp_path)
    with pytest.raises(PalError, match="nowhere"):
        Backbone.load(tmp_path / "nowhere")
