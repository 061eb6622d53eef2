"""The gradient of embeddings that are the LM head's too, against the modules called plainly."""

from copy import deepcopy

import pytest
import torch

from pal.backbone.families import FAMILIES
from pal.backbone.llm import Backbone
from pal.types import IGNORE, LLMInputs
from tests.models import LLM

V, T = 48, 9


def model(family="llama", tie=True, **more):
    torch.manual_seed(0)
    config = {**LLM, "model_type": family, "head_dim": 8, "vocab_size": V, "tie_word_embeddings": tie, **more}
    return Backbone.load(config, dtype=torch.float64).requires_grad_(True)


def inputs(embedded_BTD, ids_BT):
    labels_BT = ids_BT.clone()
    labels_BT[:, : T // 2] = IGNORE
    return LLMInputs(
        inputs_embeds_BTD=embedded_BTD,
        position_ids_BT=torch.arange(T).expand(2, -1),
        attention_mask_BT=torch.ones(2, T, dtype=torch.long),
        audio_context=None,
        labels_BT=labels_BT,
    )


def some_ids():
    ids_BT = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(1))
    ids_BT[0, 3] = ids_BT[0, 4]  # the same row twice
    ids_BT[1, 0] = 0  # padding, where there is some
    return ids_BT


def plain_gradient(llm, ids_BT):
    """Of the same loss, by transformers' own modules."""
    llm.zero_grad()
    given = inputs(llm.lm.get_input_embeddings()(ids_BT), ids_BT)
    out = llm(given).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(
        out.flatten(0, 1), given.labels_BT[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    ).backward()
    return llm.lm.get_input_embeddings().weight.grad.clone()


def gradient(llm, ids_BT):
    total, _ = llm.loss(inputs(llm.embed(ids_BT), ids_BT))
    total.backward()
    return llm.lm.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_the_modules(family, padding):
    llm = model(family, pad_token_id=padding)
    ids_BT = some_ids()
    expected = plain_gradient(llm, ids_BT)
    llm.zero_grad()
    torch.testing.assert_close(gradient(llm, ids_BT), expected)


def test_steps_add_up():
    """As in gradient accumulation, and with text embedded in two calls."""
    llm = model()
    ids_BT = some_ids()
    expected = plain_gradient(llm, ids_BT)
    llm.zero_grad()
    gradient(llm, ids_BT)
    halves = torch.cat([llm.embed(part) for part in (ids_BT[:, :4], ids_BT[:, 4:])], dim=1)
    llm.loss(inputs(halves, ids_BT))[0].backward()
    torch.testing.assert_close(llm.lm.lm_head.weight.grad, 2 * expected)


def test_gradient_is_there_where_the_head_took_no_part():
    llm = model()
    ids_BT = some_ids()
    expected = torch.bincount(ids_BT.flatten(), minlength=V)[:, None].double().repeat(1, llm.width)
    expected[0] = 0  # padding
    for times in (1, 2):
        llm.embed(ids_BT).sum().backward()
        torch.testing.assert_close(llm.lm.lm_head.weight.grad, times * expected)


def test_nothing_is_left_of_a_backward_pass_that_broke_off():
    llm = model()
    ids_BT = some_ids()
    expected = plain_gradient(llm, ids_BT)
    llm.zero_grad()
    llm.embed(ids_BT)
    llm._tied.remember(ids_BT[0], torch.ones(T, llm.width, dtype=torch.float64))
    torch.testing.assert_close(gradient(llm, ids_BT), expected)


def test_autograd_grad_sees_it():
    llm = model()
    ids_BT = some_ids()
    expected = plain_gradient(llm, ids_BT)
    llm.zero_grad()
    total, _ = llm.loss(inputs(llm.embed(ids_BT), ids_BT))
    (found,) = torch.autograd.grad(total, [llm.lm.lm_head.weight])
    torch.testing.assert_close(found, expected)
    assert llm.lm.lm_head.weight.grad is None


def test_a_copy_trains_its_own_weights():
    llm = model()
    ids_BT = some_ids()
    expected = gradient(llm, ids_BT)
    other = deepcopy(llm)
    other.zero_grad()
    torch.testing.assert_close(gradient(other, ids_BT), expected)
    torch.testing.assert_close(llm.lm.lm_head.weight.grad, expected)


def test_hooks_of_the_modules_are_called():
    """Sharded weights are put together by hooks, so the modules must not be passed by."""
    llm = model()
    ids_BT = some_ids()
    called = []
    llm.lm.get_input_embeddings().register_forward_hook(lambda *_: called.append("embeddings"))
    llm.lm.lm_head.register_forward_pre_hook(lambda *_: called.append("head"))
    found = gradient(llm, ids_BT)
    assert called == ["embeddings", "head"]
    torch.testing.assert_close(found, plain_gradient(llm, ids_BT))


@pytest.mark.parametrize("tie", [True, False])
def test_no_second_matrix_of_the_vocabulary(tie):
    """Tied: the backward pass makes one matrix as large as the vocabulary; untied, one for each."""
    llm = model(tie=tie, vocab_size=4000)
    large = 8 * 4000 * llm.width
    ids_BT = some_ids()
    total, _ = llm.loss(inputs(llm.embed(ids_BT), ids_BT))
    with torch.profiler.profile(profile_memory=True) as profile:
        total.backward()
    made = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    assert sum(one >= large for one in made) == (1 if tie else 2)
