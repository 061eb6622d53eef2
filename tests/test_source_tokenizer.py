"""A bundle names the tokenizer of a known LLM instead of holding it."""

import json

import pytest
from transformers import AutoModelForMultimodalLM, AutoProcessor

from pal.errors import BundleError, WeightsWarning
from pal.files import atomic_folder, verify
from pal.pretrained import SMOLLM2, folder_of
from pal.source_tokenizer import digest, find
from tests.models import noise, pal, tiny_model

CLIP = (noise(0.8).numpy(), 16_000)
QUESTION = "What sound is this?"


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A tiny LLM in the cache under the name of a known one; returns its folder and a model on it."""
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "cache"))
    donor = tiny_model()
    folder = folder_of(SMOLLM2.name)
    with atomic_folder(folder) as temporary:
        donor.llm.lm.save_pretrained(temporary)
        donor.tokenizer.save_pretrained(temporary)
    return folder, tiny_model(llm=SMOLLM2.name)


def tokenizer_files(folder):
    return [name for name in verify(folder) if "token" in name or name.endswith(".jinja")]


def test_it_is_left_out_and_found_again(known, tmp_path):
    _, model = known
    model.save_pretrained(tmp_path / "m")
    assert tokenizer_files(tmp_path / "m") == []
    loaded = pal.load(tmp_path / "m")
    assert digest(loaded.tokenizer) == digest(model.tokenizer)
    assert loaded.ask(CLIP, QUESTION) == model.ask(CLIP, QUESTION)


def test_transformers_auto_classes_find_it(known, tmp_path):
    _, model = known
    model.save_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert digest(processor.tokenizer) == digest(model.tokenizer)
    assert processor.chat_template == model.tokenizer.chat_template
    assert (processor.after_clip, processor.system) == (model.config.after_clip, model.config.system)
    auto = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert digest(auto.pal.tokenizer) == digest(model.tokenizer)
    auto.save_pretrained(tmp_path / "again")
    assert tokenizer_files(tmp_path / "again") == []


def test_another_tokenizer_is_refused(known, tmp_path):
    folder, model = known
    model.save_pretrained(tmp_path / "m")
    other = tiny_model().tokenizer
    other.add_tokens(["new"])
    other.save_pretrained(folder)
    with pytest.raises(BundleError, match=f"tokenizer found in '{SMOLLM2.name}' is not that of then.*other_weights"):
        pal.load(tmp_path / "m")
    with pytest.warns(WeightsWarning, match=r"tokenizer found .* answers will differ"):
        assert "new" in pal.load(tmp_path / "m", other_weights=True).tokenizer.get_vocab()
    with pytest.raises(BundleError, match="is not that of then"):
        AutoProcessor.from_pretrained(tmp_path / "m")
    with pytest.warns(WeightsWarning, match="tokenizer found"):
        assert "new" in AutoProcessor.from_pretrained(tmp_path / "m", other_weights=True).tokenizer.get_vocab()
    with pytest.warns(WeightsWarning, match="tokenizer found"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", other_weights=True)


@pytest.mark.parametrize("change", ["token", "template", "full"])
def test_what_the_source_does_not_have_is_kept(known, tmp_path, change):
    _, model = known
    if change == "token":
        model.tokenizer.add_tokens(["new"])
    if change == "template":
        model.tokenizer.chat_template += " "
    model.save_pretrained(tmp_path / "m", full=change == "full")
    assert "tokenizer.json" in tokenizer_files(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tokenizer"] is None
    assert digest(pal.load(tmp_path / "m").tokenizer) == digest(model.tokenizer)


def test_a_source_out_of_reach_does_not_keep_a_bundle_from_being_written(known, tmp_path):
    folder, model = known
    folder.rename(tmp_path / "gone")
    (tmp_path / "gone").joinpath("tokenizer.json").unlink()
    (tmp_path / "gone").rename(folder)
    model.save_pretrained(tmp_path / "m")
    assert "tokenizer.json" in tokenizer_files(tmp_path / "m")


def test_options_of_the_processor_hold(known, tmp_path):
    _, model = known
    model.save_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m", system="Be short.", after_clip="|")
    assert (processor.system, processor.after_clip) == ("Be short.", "|")


@pytest.mark.parametrize("change", [None, "token", "template"])
def test_a_processor_saved_into_a_bundle_comes_back(known, tmp_path, change):
    _, model = known
    model.save_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    if change == "token":
        processor.tokenizer.add_tokens(["new"])
    if change == "template":
        processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(tmp_path / "m")
    again = AutoProcessor.from_pretrained(tmp_path / "m")
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    assert (tokenizer_files(tmp_path / "m") == []) == (change is None)


def test_a_configuration_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BundleError, match=r"config\.json: no JSON object"):
        find(tmp_path)


def test_other_llms_keep_theirs(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    assert "tokenizer.json" in tokenizer_files(tmp_path / "m")


def test_a_tokenizer_is_found_in_any_of_these(known, tmp_path):
    folder, model = known
    model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "full", full=True)
    for source in (tmp_path / "m", tmp_path / "full", folder, SMOLLM2.name):
        assert digest(find(source)) == digest(model.tokenizer)
