"""Saving and loading: one format, whichever way."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from pal.errors import BundleError, PalError
from pal.files import verify
from pal.hf import PalForConditionalGeneration, PalProcessor
from tests.hf.chats import KINDS, chat, left_out, model_of, new_ids, tensors
from tests.models import pal, tiny_model


def test_one_format(tmp_path):
    """What the one way reads and writes is what the other does, file by file the same."""
    model = tiny_model(system="Be brief.")
    model.save_pretrained(tmp_path / "m")
    pal.load(tmp_path / "m").save_pretrained(tmp_path / "a")
    AutoModelForMultimodalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "b")
    assert verify(tmp_path / "a") == verify(tmp_path / "b")
    assert pal.load(tmp_path / "b").digest == model.digest
    inputs = tensors(AutoProcessor.from_pretrained(tmp_path / "b"), chat(0.3))
    assert "Be brief." in AutoProcessor.from_pretrained(tmp_path / "b").batch_decode(inputs["input_ids"])[0]


def test_a_flipped_byte_is_noticed_by_the_auto_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("way", ["pal", "auto"])
def test_sharded(tmp_path, way):
    model = tiny_model()
    saved = model if way == "pal" else PalForConditionalGeneration.wrap(model)
    saved.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(4 * tensor.numel() for tensor in model.state_dict().values())
    assert max((tmp_path / "m" / name).stat().st_size for name in shards) < max(20_000, largest) + 8_000
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "m").pal.digest == model.digest
    assert pal.load(tmp_path / "m").digest == model.digest
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(BundleError, match=shards[1]):
        pal.load(tmp_path / "m")


def test_an_index_cannot_name_files_outside(tmp_path):
    from pal.files import amend

    model = tiny_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "other")
    index = json.dumps({"weight_map": {"x": "../other/model.safetensors"}}).encode()
    amend(tmp_path / "m", {"model.safetensors.index.json": index})
    with pytest.raises(BundleError, match=r"\.\./other"):
        pal.load(tmp_path / "m")


@pytest.mark.parametrize("size", ["many", "0", -3, "5 bananas"])
def test_a_size_that_is_none(tmp_path, size):
    with pytest.raises(BundleError, match="5GB"):
        tiny_model().save_pretrained(tmp_path / "m", max_shard_size=size)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dtype(tmp_path, kind, name):
    dtype = getattr(torch, name)
    model_of(kind).save_pretrained(tmp_path / "m")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype} == {loaded.dtype}
    rotary = loaded.pal.llm.lm.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32, "positions would be rounded"
    inputs = tensors(PalProcessor.of(loaded.pal), chat(0.4), chat(0.7, 1))
    exact = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert exact.dtype == torch.float32
    near = loaded(**inputs).logits.float() - exact(**inputs).logits
    assert near.abs().mean() < 0.2 * exact(**inputs).logits.abs().mean()
    assert new_ids(loaded, inputs, max_new_tokens=3).shape[0] == 2
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert again.pal.digest == loaded.pal.digest == pal.load(tmp_path / "half").digest


def test_dtype_of_a_bundle_with_a_foreign_llm(tmp_path):
    """Trap: its digests are those of the weights as they were, not as they are cast."""
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_model(llm=str(tmp_path / "llm")).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["left_out"]
    half = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["left_out"]
    assert pal.load(tmp_path / "half").digest == half.pal.digest


def test_device_map(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", device_map=device_map)
        assert loaded.device.type in ("cpu", "cuda", "mps", "xpu")
        assert set(loaded.hf_device_map) == {""}
    for device_map, says in (({"llm": 0, "ears": "cpu"}, "2 devices"), ("nonsense", "nonsense")):
        with pytest.raises(PalError, match=says) as caught:
            AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", device_map=device_map)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"attn_implementation": "sdpa"}, {"dtype": "float7"}, {"load_in_8bit": True}, {"dtype": torch.float64}]
)
def test_options_that_cannot_be_followed(tmp_path, options):
    tiny_model().save_pretrained(tmp_path / "m")
    with pytest.raises(PalError) as caught:
        PalForConditionalGeneration.from_pretrained(tmp_path / "m", **options)
    assert "\n" not in str(caught.value)


def test_trained_parts_or_everything(foreign, tmp_path):
    loaded = AutoModelForMultimodalLM.from_pretrained(foreign)
    loaded.save_pretrained(tmp_path / "part")
    loaded.save_pretrained(tmp_path / "all", full=True)
    assert left_out(tmp_path / "part") == left_out(foreign) != set()
    assert left_out(tmp_path / "all") == set()
    # what an optimiser changes is written, though nobody said that it would be trained
    with torch.no_grad():
        loaded.pal.llm.lm.model.norm.weight.add_(0.5)
    loaded.save_pretrained(tmp_path / "trained")
    assert left_out(tmp_path / "part") - left_out(tmp_path / "trained") == {"llm.lm.model.norm.weight"}
    for name in ("all", "trained"):
        again = AutoModelForMultimodalLM.from_pretrained(tmp_path / name)
        assert again.pal.digest == (loaded.pal.digest if name == "trained" else pal.load(foreign).digest)
    wrapped = PalForConditionalGeneration.wrap(pal.load(foreign))
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert left_out(tmp_path / "wrapped") == left_out(foreign)


def test_saving_keeps_others_files(tmp_path):
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    folder = tmp_path / "out"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "state.json").write_text("{}")
    wrapped.save_pretrained(folder, max_shard_size="20KB")
    wrapped.save_pretrained(folder)
    assert (folder / "checkpoint-5" / "state.json").exists()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert AutoModel.from_pretrained(folder).pal.digest == wrapped.pal.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
