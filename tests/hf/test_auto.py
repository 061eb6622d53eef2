"""transformers' Auto classes on bundles, however they are imported and wherever they lie."""

import json
import subprocess
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from pal import bundle
from pal.errors import BundleError, ConfigError
from pal.files import verify
from pal.hf import PalConfig, PalForConditionalGeneration, PalProcessor
from tests.counts import full_only
from tests.hf.chats import QUESTION, chat, new_ids, one_kind, tensors
from tests.models import LLM, noise, pal, tiny_model

IMPORTS = """
import os, sys
import pal
assert not {"torch", "transformers"} & set(sys.modules), "import pal is heavy"

# what both orders need and nobody watches, imported once
import scipy.optimize, torch._dynamo, torch.distributed.tensor, transformers.models
assert not [name for name in sys.modules if name.startswith("transformers.models.auto")]

def pal_first():
    from transformers import AutoModelForMultimodalLM, AutoConfig, AutoProcessor, AutoModel
    return pal.SHIPPED, AutoModelForMultimodalLM, AutoConfig, AutoProcessor, AutoModel

def transformers_first():
    for name in [name for name in sys.modules if name.split(".")[0] == "pal"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("pal.")]
    import transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto
    from transformers import AutoProcessor, AutoConfig, AutoModelForMultimodalLM
    assert "pal" not in sys.modules
    import pal
    return pal.SHIPPED, AutoProcessor, AutoConfig, AutoModelForMultimodalLM

for imported in (pal_first, transformers_first):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, imported
        continue
    folder, *autos = imported()
    print(*[type(auto.from_pretrained(folder)).__name__ for auto in autos])
    # and the modules look as if nobody had watched them
    module = sys.modules["transformers.models.auto.configuration_auto"]
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    break
"""


@pytest.mark.torture
@full_only
def test_auto_classes_know_a_bundle_after_import_pal_alone():
    """Whichever is imported first, and without importing transformers before it is asked for."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = "PalForConditionalGeneration"
    assert done.stdout.splitlines() == [f"{model} PalConfig PalProcessor {model}", f"PalProcessor PalConfig {model}"]


def test_both_ways_of_loading_give_one_model(pair):
    model, auto, processor = pair
    assert isinstance(auto, PalForConditionalGeneration)
    assert isinstance(processor, PalProcessor)
    assert auto.pal.digest == model.digest
    assert isinstance(auto.config, PalConfig)
    assert auto.config.get_text_config().hidden_size == LLM["hidden_size"]
    assert not auto.training
    assert type(AutoModel.from_pretrained(auto.config.name_or_path)) is PalForConditionalGeneration


def test_the_shipped_model_loads_both_ways():
    auto = AutoModelForMultimodalLM.from_pretrained(pal.SHIPPED)
    processor = AutoProcessor.from_pretrained(pal.SHIPPED)
    model = pal.load("tiny")
    assert auto.pal.digest == model.digest
    inputs = tensors(processor, chat(2.0), chat(1.0, 1))
    answers = processor.batch_decode(new_ids(auto, inputs), skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == model.ask(
        [(noise(2.0).numpy(), 16_000), (noise(1.0, 1).numpy(), 16_000)], QUESTION
    )


def test_a_folder_of_an_earlier_version_is_upgraded(tmp_path):
    from pal.files import amend

    tiny_model(system="Be brief.").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    old = json.loads(path.read_text())
    for name in ("model_type", "architectures", "dtype"):
        del old[name]
    amend(tmp_path / "m", {"config.json": json.dumps(old).encode(), "processor_config.json": b"{}"})
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert pal.load(tmp_path / "m").digest == tiny_model().digest
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(tmp_path / "m")
    bundle.upgrade(tmp_path / "m")
    verify(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == weights
    assert AutoModel.from_pretrained(tmp_path / "m").pal.digest == tiny_model().digest
    assert AutoProcessor.from_pretrained(tmp_path / "m").system == "Be brief."


@one_kind
def test_a_model_from_its_configuration_alone_is_untrained(pair):
    _, auto, _ = pair
    fresh = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(auto.config.name_or_path))
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in auto.named_parameters()]
    assert fresh.pal.digest != auto.pal.digest
    with pytest.raises(ConfigError, match="from_pretrained"):
        PalForConditionalGeneration(PalConfig())


def test_all_read_from_the_hub_by_its_id(tmp_path, monkeypatch):
    """From a cache as huggingface_hub keeps it, since the tests reach no Hub."""
    commit = "a" * 40
    cached = tmp_path / "models--me--model"
    tiny_model(system="Be brief.").save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": commit}):
        auto = AutoModelForMultimodalLM.from_pretrained("me/model", cache_dir=tmp_path, **options)
        assert auto.pal.digest == tiny_model().digest
        assert AutoProcessor.from_pretrained("me/model", cache_dir=tmp_path, **options).system == "Be brief."
    with pytest.raises(BundleError, match="the Hub did not give it"):
        PalForConditionalGeneration.from_pretrained("me/model", cache_dir=tmp_path, revision="gone")
