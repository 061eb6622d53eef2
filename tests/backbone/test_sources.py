"""Folders that hold no LLM of ours: each is refused by name, in one line with the remedy."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pal.errors import PalError
from tests.models import ENCODER, pal, tiny_model


@pytest.fixture
def folder(tmp_path):
    """An LLM with its tokenizer."""
    donor = tiny_model()
    donor.llm.save(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def refused(path, says):
    with pytest.raises(PalError, match=says) as caught:
        pal.attach(llm=str(path), encoders=[ENCODER], integration="lal")
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300
    assert ";" in text or "supported:" in text, "no remedy"


def amended(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"bits": 4, "group_size": 128}),
        ("awq", {"bits": 4, "group_size": 128}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True}),
        ("fp8", {}),
    ],
)
def test_quantised(folder, method, options):
    refused(
        amended(folder, quantization_config={"quant_method": method, **options}), rf"quantised \({method}\).*; give"
    )


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter(folder, tmp_path, with_config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    if with_config:
        (tmp_path / "adapter" / "config.json").write_text((folder / "config.json").read_text())
    refused(tmp_path / "adapter", "is an adapter of PEFT; merge it")
    # and what the remedy says works
    model.merge_and_unload().save_pretrained(folder)
    assert pal.attach(llm=str(folder), encoders=[ENCODER], integration="lal").llm.n_layers == 3


def test_gguf(folder):
    (folder / "model.safetensors").unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")
    refused(folder, r"is a folder with GGUF files; give one of the files, such as .*x\.gguf")
    refused(folder / "x.gguf", "cannot read the GGUF file .*; copy or download it again")
    (folder / "x.gguf").write_bytes(b"GGML" + bytes(100))
    refused(folder / "x.gguf", "is no GGUF file, whatever its name; copy")
    refused(folder / "y.gguf", "is no file here; give a GGUF file")


def test_pickled_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert pal.attach(llm=str(folder), encoders=[ENCODER], integration="lal")
    (folder / "model.safetensors").unlink()
    refused(folder, "as pickle, which is not read; save")


def test_without_a_tokenizer(folder):
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special")):
            path.unlink()
    refused(folder, "holds no tokenizer; save it there .* 'tokenizer'")
    tiny_model().tokenizer.save_pretrained(folder.parent / "words")
    model = pal.attach(
        llm={"path": str(folder), "tokenizer": str(folder.parent / "words")}, encoders=[ENCODER], integration="lal"
    )
    assert model.ask((torch.ones(8000).numpy() * 0.1, 16_000), "yes", max_new_tokens=1) is not None


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "cannot load the tokenizer")


def test_another_family(folder):
    refused(amended(folder, model_type="gpt_neox"), "'gpt_neox' is not supported; supported: gemma")


@pytest.mark.parametrize("name", ["nowhere/at/all", "/nowhere"])
def test_no_folder(name):
    refused(name, "no folder here; give one")


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", b"123"), ("config.json", b"{"), ("config.json", b"{}")]
)
def test_files_that_cannot_be_read(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(PalError, match="cannot load the LLM") as caught:
        pal.attach(llm=str(folder), encoders=[ENCODER], integration="lal")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ["tiny", "clap"])
def test_an_attached_model_is_in_evaluation_mode(folder, encoder):
    """Trap: asked in training mode, batch statistics move."""
    from pal.registry import toy

    part = ENCODER if encoder == "tiny" else toy("encoder", encoder)
    model = pal.attach(llm=str(folder), encoders=[part], integration="lal")
    assert not any(module.training for module in model.modules())
    before = model.digest
    rate = model.sampling_rate
    model.ask((torch.linspace(-0.3, 0.3, rate).numpy(), rate), "yes", max_new_tokens=1)
    assert model.digest == before


def _pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")


def _cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def _index(text):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: amended(folder, hidden_size=64), r"of another model .* has shape .*; give both"),
        (lambda folder: amended(folder, num_hidden_layers=2), r"have more layers .* model\.layers\.2\..*; give both"),
        (lambda folder: amended(folder, vocab_size="x"), "field 'vocab_size'; its config.json must"),
        (lambda folder: amended(folder, quantization_config=[1]), "; its config.json must be one that"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing; give"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights .*; copy"),
        (_pointer, "is a pointer of Git LFS.*; run 'git lfs pull'"),
        (_cut, "; copy or download its weights again"),
        (_index('{"metadata": {}, "weight_map": {"x": "gone.safetensors"}}'), "gone.safetensors is missing.*; copy"),
        (_index("[]"), "no index of weights; copy"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load the tokenizer.*; copy or download"),
    ],
)
def test_what_is_wrong_in_a_folder_is_said_in_one_line(folder, change, says):
    change(folder)
    refused(folder, says)


def test_weights_that_nobody_needs_pass(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.layers.9.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert pal.attach(llm=str(folder), encoders=[ENCODER], integration="lal").llm.n_layers == 3
