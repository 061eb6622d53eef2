"""LLMs out of GGUF files, whose tensors were quantised and are dequantised by the package `gguf`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import pal
from pal.backbone.llm import Backbone
from pal.backbone.tokenizer import train_tokenizer
from pal.bundle import source_digests
from pal.convert import convert, read
from pal.convert.gguf import exact_dtype
from pal.errors import ConfigError, PalError
from pal.hub_configs import config_of
from pal.plan import plan
from pal.train.recipe import Recipe
from tests.convert.files import TEMPLATE, llama, save_gguf
from tests.models import ENCODER, WORDS, noise

TOKENIZER = train_tokenizer(WORDS, 288)
LLAMA = llama(len(TOKENIZER), tied=True)
IDS_BT = torch.tensor([[5, 17, 3, 250, 99, 4]])


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file in Q4_1, and the values that it stands for."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return path, save_gguf(LLAMA, TOKENIZER, path, "Q4_1")


def logits_of(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm(IDS_BT).logits
    return found


def reference(meant: dict[str, torch.Tensor], tied: bool = True) -> LlamaForCausalLM:
    model = llama(len(TOKENIZER), tied)
    missing = model.load_state_dict(meant, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    return model


def test_a_folder_holds_the_dequantised_values(quantised: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, meant = quantised
    facts = convert(path, tmp_path / "out", "gguf")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == meant.keys()
    for name, tensor in meant.items():
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], tensor), name
    assert (facts["numbers"], facts["left_out"]) == (sum(tensor.numel() for tensor in meant.values()), 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("llama", "float32", True)
    assert config["rope_parameters"]["rope_theta"] == 7777
    assert config["architectures"] == ["LlamaForCausalLM"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == TOKENIZER.eos_token_id

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(plain), logits_of(reference(meant)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*WORDS, "Ünknown wörds: 漢字\n"):
        assert tokenizer(text).input_ids == TOKENIZER(text).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == tokenizer.pad_token == TOKENIZER.eos_token != tokenizer.bos_token
    assert tokenizer.decode(tokenizer("yes , no .").input_ids) == "yes , no ."


def test_a_head_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "untied.gguf"
    meant = save_gguf(llama(len(TOKENIZER), tied=False), TOKENIZER, path, "Q4_1")
    convert(path, tmp_path / "out", "gguf")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], meant["lm_head.weight"])
    ours = Backbone.load(path).lm
    torch.testing.assert_close(logits_of(ours), logits_of(reference(meant, tied=False)))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_the_stored_type_is_the_smallest_that_keeps_all_values(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    meant = save_gguf(LLAMA, TOKENIZER, path, kind)
    read_ones = read(path, "gguf")
    assert read_ones.config["dtype"] == str(dtype).removeprefix("torch.")
    for name, tensor in meant.items():
        assert read_ones.tensors[name].dtype == dtype and torch.equal(read_ones.tensors[name].float(), tensor), name


def test_exact_dtype() -> None:
    one = torch.ones(2)
    assert exact_dtype([one]) == torch.bfloat16
    assert exact_dtype([one, one + 2**-10]) == torch.float16
    assert exact_dtype([one, one * 2**30]) == torch.bfloat16
    assert exact_dtype([one + 2**-10, one * 2**30]) == torch.float32
    assert exact_dtype([one + 2**-20]) == torch.float32


def test_attach_to_a_file(quantised: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, meant = quantised
    model = pal.attach(llm=str(path), encoders=[ENCODER], integration="lal")
    torch.testing.assert_close(logits_of(model.llm.lm), logits_of(reference(meant)))
    answer = model.ask((noise(0.5).numpy(), 16_000), "What sound is this?", max_new_tokens=4)
    assert isinstance(answer, str)
    # it is an LLM as any other: what trains, is saved and loaded again
    model.llm.lm.model.norm.weight.requires_grad_(True)
    model.llm.save(tmp_path / "llm")
    assert torch.equal(logits_of(Backbone.load(tmp_path / "llm").lm), logits_of(model.llm.lm))
    # a bundle holds none of its weights, and notices another file
    model.save_pretrained(tmp_path / "bundle")
    assert len(source_digests(model)) == len(model.llm.state_dict())
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["model"]["llm"]["path"] == str(path)
    assert "quantization_config" not in (tmp_path / "bundle" / "config.json").read_text()
    assert pal.load(tmp_path / "bundle").digest == model.digest


def test_a_bundle_takes_the_file_and_the_folder_made_of_it(
    quantised: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, _ = quantised
    convert(path, tmp_path / "out", "gguf")
    of_file, of_folder = (pal.attach(llm=str(one), encoders=[ENCODER]) for one in (path, tmp_path / "out"))
    assert source_digests(of_file) == source_digests(of_folder)


def test_files_beside_it_are_not_read(quantised: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Trap: transformers prefers a tokenizer.json in the folder to the tokenizer in the file."""
    (tmp_path / "x.gguf").symlink_to(quantised[0])
    train_tokenizer(["something else entirely"], 264).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    model = pal.attach(llm=str(tmp_path / "x.gguf"), encoders=[ENCODER])
    assert model.tokenizer(WORDS[0]).input_ids == TOKENIZER(WORDS[0]).input_ids
    assert model.llm.width == 64


def test_a_plan_reads_the_shape(quantised: tuple[Path, dict[str, Any]]) -> None:
    fields = config_of(str(quantised[0]))
    assert (fields["hidden_size"], fields["vocab_size"]) == (64, len(TOKENIZER))
    stage = {"train": {"projectors": True}, "lr": 1, "steps": 1, "batch": {"rows": 1}}
    model = {"llm": str(quantised[0]), "encoders": [ENCODER]}
    made = plan(Recipe(model=model, data={"x": {"manifest": "x"}}, stages=[stage]), seconds=1)
    assert made.parameters["llm"] == sum(p.numel() for p in LLAMA.parameters())


def test_what_is_refused(quantised: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(PalError, match=message) as caught:
            convert(path, tmp_path / "out", "gguf")
        assert not (tmp_path / "out").exists()
        assert len(str(caught.value)) <= 300

    data = quantised[0].read_bytes()
    refuse(tmp_path / "none.gguf", "is no file here")
    (tmp_path / "cut.gguf").write_bytes(data[:-5000])
    refuse(tmp_path / "cut.gguf", r"cannot read the GGUF file '.*cut.gguf': .*; copy or download it again")
    (tmp_path / "head.gguf").write_bytes(data[:700])
    refuse(tmp_path / "head.gguf", "cannot read the GGUF file")
    (tmp_path / "other.gguf").write_bytes(data.replace(b"llama", b"lhama"))
    refuse(tmp_path / "other.gguf", "lhama is not supported")
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"the name of a GGUF file ends in \.gguf"):
        convert(tmp_path / "x.bin", tmp_path / "out", "gguf")
    monkeypatch.setattr("pal.backbone.gguf.find_spec", lambda name: None)
    refuse(quantised[0], r"needs a package: pip install 'pal-audio\[gguf\]'")
