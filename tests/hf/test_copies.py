"""Models as the standard tools copy them: deep copies, pickles, other processes."""

import copy
import importlib
import pickle

import pytest
import torch

from pal.backbone.families import FAMILIES
from pal.backbone.finetuning import LoRA
from pal.backbone.llm import Backbone
from pal.hf import PalForConditionalGeneration, PalProcessor
from tests.hf.chats import KINDS, chat, model_of, tensors
from tests.models import LLM, noise, tiny_model
from tests.processes import fresh

CLIP = (noise(0.4).numpy(), 16_000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_answers_alike_and_has_weights_of_its_own(kind):
    model = model_of(kind)
    model.fold()
    said = model.ask(CLIP, "yes", max_new_tokens=4)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.digest == model.digest
        assert again.ask(CLIP, "yes", max_new_tokens=4) == said
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(0.5)
        assert again.digest != model.digest
    assert model.ask(CLIP, "yes", max_new_tokens=4) == said


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_of_an_llm_is_found_by_its_name(family):
    llm = Backbone.load({**LLM, "model_type": family, "head_dim": 8})
    kind = type(llm.lm)
    assert getattr(importlib.import_module(kind.__module__), kind.__qualname__) is kind
    assert type(Backbone.load({**LLM, "model_type": family, "head_dim": 8}).lm) is kind, "one class for all models"
    assert not kind.is_custom_code(), "transformers would treat its weights as somebody's own"
    assert type(pickle.loads(pickle.dumps(llm)).lm) is kind
    with pytest.raises(AttributeError, match="Nothing"):
        importlib.import_module(kind.__module__).Nothing  # noqa: B018


def test_a_copy_trains_as_the_original_does():
    """Trap: gradients of tied embeddings are put together by a hook, which no pickle holds."""
    model = tiny_model(llm={"fresh": {**LLM, "tie_word_embeddings": True}})
    model.llm.add_lora(LoRA(r=2))
    wrapped = PalForConditionalGeneration.wrap(model)
    wrapped.requires_grad_(True)
    inputs = tensors(PalProcessor.of(model), chat(0.3))
    grads = []
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    wrapped.zero_grad()
    for one in (wrapped, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, msg=name)


def shares(wrapped, inputs, queue):
    model = wrapped.pal
    ids = wrapped.generate(**inputs, max_new_tokens=4).tolist()
    queue.put((model.digest, model.ask(CLIP, "yes", max_new_tokens=4), ids))


def test_another_process_takes_it():
    """One that has imported nothing of ours before."""
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    inputs = dict(tensors(PalProcessor.of(wrapped.pal), chat(0.3)))
    queue = fresh().SimpleQueue()
    process = fresh().Process(target=shares, args=(wrapped, inputs, queue))
    process.start()
    found = queue.get()
    process.join()
    ids = wrapped.generate(**inputs, max_new_tokens=4).tolist()
    assert found == (wrapped.pal.digest, wrapped.pal.ask(CLIP, "yes", max_new_tokens=4), ids)
