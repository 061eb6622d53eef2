"""Losses, generation, adapters, precision and compilation, with each integration."""

from copy import deepcopy

import pytest
import torch
from transformers import GenerationConfig

from pal.backbone.finetuning import LoRA
from pal.backbone.llm import Backbone
from pal.backbone.tokenizer import train_tokenizer
from pal.errors import ConfigError, PalError
from pal.types import AUDIO, Tokens
from tests.identities.models import (
    INTEGRATIONS,
    PLACEMENTS,
    VOCAB,
    conversation,
    features,
    fields,
    make_backbone,
    make_integration,
    shared,
)

every_integration = pytest.mark.parametrize("name", INTEGRATIONS)


def labelled(llm, integration, side="right"):
    rows = [
        Tokens([5, AUDIO, 6, 7, 8], [0], [-100, -100, -100, 7, 8]),
        Tokens([5, 9, AUDIO, AUDIO, 8, 9, 11], [1, 0], [-100] * 5 + [9, 11]),
        Tokens([5, 6, 7], [], [-100, -100, 7]),
    ]
    return integration(features(5, 8), rows, llm, side)


@every_integration
@torch.no_grad()
def test_loss_and_scores_by_hand(name):
    llm, integration = shared("llama", name)
    inputs = labelled(llm, integration)
    log_p = llm(inputs).logits.log_softmax(-1)
    scores = torch.zeros(3)
    for b in range(3):
        for t in range(1, log_p.shape[1]):
            label = int(inputs.labels_BT[b, t])
            if label != -100:
                scores[b] += log_p[b, t - 1, label]
    total, tokens = llm.loss(inputs)
    assert tokens == 5
    torch.testing.assert_close(total, -scores.sum())
    torch.testing.assert_close(llm.label_scores(inputs), scores)


@torch.no_grad()
def test_a_loss_per_answer_is_the_sum_of_their_means():
    llm, integration = shared("llama", "lal")
    # two answers of two tokens and of one in a row, one of three in the next
    rows = [
        Tokens([5, AUDIO, 7, 8, 6, 9, 4], [0], [-100, -100, 7, 8, -100, 9, -100]),
        Tokens([5, AUDIO, 9, 11, 12], [1], [-100, -100, 9, 11, 12]),
    ]
    inputs = integration(features(5, 8), rows, llm)
    log_p = llm(inputs).logits.log_softmax(-1)
    # the columns of the text rows; before the first answers one that asks again behind the clip
    first = -(log_p[0, 1, 7] + log_p[0, 2, 8]) / 2
    second = -log_p[0, 4, 9]
    third = -(log_p[1, 1, 9] + log_p[1, 2, 11] + log_p[1, 3, 12]) / 3
    total, answers = llm.loss(inputs, per="answer")
    assert answers == 3
    torch.testing.assert_close(total, first + second + third)


def test_the_head_runs_on_rows_with_labels_only():
    llm, integration = shared("llama", "plits")
    shapes = []
    hook = llm.lm.lm_head.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    llm.loss(labelled(llm, integration))
    hook.remove()
    assert shapes == [(5, 32)]


def test_a_clip_is_projected_once_for_all_rows_that_share_it():
    llm, integration = shared("llama", "lal")
    shapes = []
    hook = integration.projectors["0"].register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    rows = [conversation(PLACEMENTS["middle"])] * 5
    llm(integration(features(7), rows, llm))
    hook.remove()
    assert shapes == [(1, 7, 10)]


def test_sampling_repeats_under_a_seed():
    llm, integration = shared("qwen3", "pal")
    inputs = integration(features(7), [conversation(PLACEMENTS["middle"])], llm)
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(llm.generate(inputs, max_new_tokens=12, do_sample=True, eos_token_id=None).tolist())
    assert made[0] == made[1] != made[2]


@every_integration
def test_the_end_token_stops_each_row(name):
    llm, integration = shared("llama", name)
    rows = [conversation(PLACEMENTS["middle"]), conversation(PLACEMENTS["none"])]
    inputs = integration(features(7), rows, llm)
    free = llm.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    end = int(free[0, 2])
    cut = llm.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=end)
    first = free[0].tolist().index(end)
    assert cut[0].tolist()[: first + 1] == free[0].tolist()[: first + 1]
    assert set(cut[0].tolist()[first + 1 :]) <= {0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a dog barks and a bell rings in the rain"] * 3, 300)


@every_integration
def test_streaming_equals_not_streaming(name, tokenizer):
    llm = make_backbone("llama", vocab_size=len(tokenizer))
    integration = make_integration(name, llm)
    inputs = integration(features(7), [conversation(PLACEMENTS["middle"])], llm)
    words = [i for token, i in tokenizer.get_vocab().items() if token.startswith("Ġ")]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: words
    whole = tokenizer.decode(llm.generate(inputs, **options)[0], skip_special_tokens=True)
    tiles = list(llm.stream(inputs, tokenizer, **options))
    assert "".join(tiles) == whole
    assert len([piece for piece in tiles if piece]) > 1


def test_streaming_hands_on_errors_and_refuses_batches(tokenizer):
    llm, integration = shared("llama", "lal")
    row = conversation(PLACEMENTS["middle"])
    with pytest.raises(ValueError, match="nonsense"):
        list(llm.stream(integration(features(7), [row], llm), tokenizer, max_new_tokens=2, nonsense=1))
    with pytest.raises(PalError, match="one conversation"):
        list(llm.stream(integration(features(7), [row, row], llm), tokenizer))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@every_integration
def test_bf16_is_near_fp32_and_trains(family, name):
    llm = make_backbone(family)
    integration = make_integration(name, llm)
    half = make_backbone(family, dtype=torch.bfloat16)
    half.load_state_dict({key: x.bfloat16() for key, x in llm.state_dict().items()})
    projectors = make_integration(name, half)  # stay in fp32, as while training
    a, _ = llm.loss(labelled(llm, integration))
    b, _ = half.loss(labelled(half, projectors))
    assert abs(a.item() - b.item()) < 0.06 * abs(a.item())
    b.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in projectors.parameters())
    made = half.generate(labelled(half, projectors), max_new_tokens=2, generation_config=GenerationConfig())
    assert made.shape == (3, 2)


@every_integration
def test_autocast_trains(name):
    llm = make_backbone("qwen3").train()
    integration = make_integration(name, llm)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = llm.loss(labelled(llm, integration))
    exact, _ = llm.loss(labelled(llm, integration))
    assert abs(total.item() - exact.item()) < 0.06 * exact.item()
    total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in integration.parameters())


@every_integration
def test_lora_starts_as_nothing_then_reaches_text_and_audio(name):
    llm = make_backbone("llama")
    integration = make_integration(name, llm)
    before = {key: x.clone() for key, x in llm.lm.state_dict().items()}
    plain = llm(labelled(llm, integration)).logits
    llm.add_lora(LoRA(r=2, dropout=0.0, targets=("k_proj", "v_proj")))
    torch.testing.assert_close(llm(labelled(llm, integration)).logits, plain)
    with torch.no_grad():
        for key, parameter in llm.lm.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    # the adapters equal weights with B A added, in the projection of audio too
    merged = make_backbone("llama")
    with torch.no_grad():
        for layer in range(3):
            for part in ("k_proj", "v_proj"):
                wrapped = getattr(llm.lm.model.layers[layer].self_attn, part)
                delta = wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight * 16 / 2
                getattr(merged.lm.model.layers[layer].self_attn, part).weight += delta
    theirs = merged(labelled(merged, integration)).logits
    torch.testing.assert_close(llm(labelled(llm, integration)).logits, theirs, atol=1e-4, rtol=1e-4)
    # and the LLM's own weights are as they were
    after = {key.replace(".base_layer", ""): x for key, x in llm.lm.state_dict().items() if "lora_" not in key}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_lora_errors():
    llm = make_backbone("llama")
    with pytest.raises(ConfigError, match="LoRA"):
        llm.train_only("lora")
    with pytest.raises(ConfigError, match="nothing_like_it"):
        llm.add_lora(LoRA(targets=("nothing_like_it",)))
    llm.add_lora(LoRA())
    with pytest.raises(PalError, match="already"):
        llm.add_lora(LoRA())


def test_facts():
    llm, _ = shared("gemma3", "lal")
    assert (llm.width, llm.n_layers, llm.vocab, llm.kv_heads, llm.head_width) == (32, 3, VOCAB, 2, 8)
    assert llm.windows == (6, None, 6)
    assert llm.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert shared("mistral", "lal")[0].windows == (7, 7, 7)
    assert shared("qwen2", "lal")[0].windows == (None,) * 3


def test_the_given_fields_stay_as_they_are():
    """transformers writes `rope_theta` into a given `rope_scaling`; a run could then not be resumed."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    given = fields("llama") | {"rope_theta": 500.0, "rope_scaling": scaling | {"original_max_position_embeddings": 64}}
    before = deepcopy(given)
    Backbone.load(given)
    assert given == before
