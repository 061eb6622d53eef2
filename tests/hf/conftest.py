"""A model and the same by way of the Auto classes, a processor, a bundle whose LLM lies elsewhere."""

import pytest
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from pal.hf import PalProcessor
from tests.hf.chats import KINDS, model_of
from tests.models import tiny_model


@pytest.fixture(scope="session", params=KINDS)
def pair(request, tmp_path_factory):
    """A model, and the same from its folder by way of the Auto classes."""
    model = model_of(request.param)
    folder = tmp_path_factory.mktemp("hf") / "m"
    model.save_pretrained(folder)
    return model, AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def processor():
    return PalProcessor.of(tiny_model())


@pytest.fixture
def foreign(tmp_path):
    """A bundle whose LLM lies elsewhere."""
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_model(llm=str(tmp_path / "llm")).save_pretrained(tmp_path / "m")
    return tmp_path / "m"
