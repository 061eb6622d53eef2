"""Bundles: what is written comes back, and what does not fit is refused."""

import json
import re
import resource
import warnings

import pytest
import torch

from pal.backbone.finetuning import LoRA
from pal.bundle import cast, read_architecture, source_digests, source_weights
from pal.errors import BundleError, PalError, WeightsWarning
from pal.files import amend, sha256
from pal.model import PalModel
from tests.models import INTEGRATIONS, LLM, noise, pal, tiny_model

QUESTION = "What sound is this?"


def ask(model):
    return model.ask((noise(0.8).numpy(), 16_000), QUESTION)


def llm_folder(folder):
    donor = tiny_model()
    donor.llm.lm.save_pretrained(folder)
    donor.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_round_trip(tmp_path, integration):
    model = tiny_model(integration)
    model.save_pretrained(tmp_path / "m")
    loaded = pal.load(tmp_path / "m")
    assert loaded.digest == model.digest
    assert ask(loaded) == ask(model)
    assert loaded.config == model.config
    assert not loaded.training


def test_a_run_folder_is_a_bundle(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run" / "model")
    assert ask(pal.load(tmp_path / "run")) == ask(tiny_model())


def test_only_what_was_trained_is_written(tmp_path):
    llm = llm_folder(tmp_path / "llm")
    model = tiny_model(llm=llm)
    model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "all", full=True)
    part, full = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("part", "all"))
    llm_bytes = sum(4 * tensor.numel() for tensor in model.llm.state_dict().values())
    assert full - part == pytest.approx(llm_bytes, rel=0.05)
    for name in ("part", "all"):
        assert pal.load(tmp_path / name).digest == model.digest


def test_tied_weights_of_a_trained_llm(tmp_path):
    """Trap: embedding and head are one tensor with two names, of which training knows one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLM, tie_word_embeddings=True))
    lm.save_pretrained(tmp_path / "llm")
    tiny_model().tokenizer.save_pretrained(tmp_path / "llm")
    model = tiny_model(llm=str(tmp_path / "llm"))
    model.trained |= {f"llm.{name}" for name, _ in model.llm.named_parameters()}
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "part")
    assert pal.load(tmp_path / "part").digest == model.digest


def test_a_full_bundle_needs_no_llm(tmp_path):
    llm = llm_folder(tmp_path / "llm")
    model = tiny_model(llm=llm)
    model.save_pretrained(tmp_path / "all", full=True)
    (tmp_path / "llm").rename(tmp_path / "gone")
    assert pal.load(tmp_path / "all").digest == model.digest


def whisper_folder(folder):
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 100}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    WhisperModel(WhisperConfig(**sizes, **rest, **tokens)).save_pretrained(folder)
    return str(folder)


def test_a_full_bundle_needs_no_encoder(tmp_path):
    whisper = whisper_folder(tmp_path / "whisper")
    model = tiny_model(encoders=[{"name": "whisper", "path": whisper}], warm=False)
    model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "all", full=True)
    assert pal.load(tmp_path / "part").digest == model.digest
    (tmp_path / "whisper").rename(tmp_path / "gone")
    loaded = pal.load(tmp_path / "all")
    assert loaded.digest == model.digest
    assert ask(loaded) == ask(model)


def test_other_weights_are_refused_with_how_far_they_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names, for a message without cuts
    llm = llm_folder("llm")
    model = tiny_model(llm=llm)
    model.save_pretrained("part")
    generator = torch.Generator().manual_seed(0)
    weight, norm = model.llm.lm.model.layers[1].mlp.up_proj.weight, model.llm.lm.model.norm.weight
    with torch.no_grad():
        noise_DF = torch.randn(weight.shape, generator=generator)
        weight += 0.1 * noise_DF / noise_DF.norm() * weight.norm()
        norm *= 1.01
    model.llm.lm.save_pretrained(llm)
    with pytest.raises(BundleError) as caught:
        pal.load("part")
    text, count = str(caught.value), len(source_digests(model))
    assert f"2 of {count} weights found in '{llm}' are not those of then" in text
    found = re.search(r"'llm.lm.model.layers.1.mlp.up_proj.weight' differs most, by about ([\d.]+) of its norm", text)
    assert found is not None and float(found[1]) == pytest.approx(0.1, rel=0.4), text
    assert "other_weights=True" in text and len(text) <= 300
    with pytest.warns(WeightsWarning, match="2 of .* answers will differ"):
        loaded = pal.load("part", other_weights=True)
    # what is not in the bundle is as found, and the rest is as trained
    assert loaded.digest == model.digest
    loaded.save_pretrained("again")
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsWarning)
        assert pal.load("again", other_weights=True).digest == model.digest


def test_other_weights_of_a_bundle_without_sketches(tmp_path):
    llm = llm_folder(tmp_path / "llm")
    model = tiny_model(llm=llm)
    model.save_pretrained(tmp_path / "part")
    (tmp_path / "part" / "left_out.safetensors").unlink()
    manifest = json.loads((tmp_path / "part" / "manifest.json").read_text())
    del manifest["sha256"]["left_out.safetensors"]
    (tmp_path / "part" / "manifest.json").write_text(json.dumps(manifest))
    assert pal.load(tmp_path / "part").digest == model.digest
    with torch.no_grad():
        model.llm.lm.model.norm.weight[0] += 1
    model.llm.lm.save_pretrained(llm)
    with pytest.raises(BundleError, match=r"1 of .* are not those of then, such as 'llm.lm.model.norm.weight'"):
        pal.load(tmp_path / "part")


def test_no_sketches_where_nothing_is_left_out(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "left_out.safetensors").exists()


def test_adapters_are_kept(tmp_path):
    llm = llm_folder(tmp_path / "llm")
    model = tiny_model(llm=llm)
    model.llm.add_lora(LoRA(r=2))
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "m")
    loaded = pal.load(tmp_path / "m")
    assert loaded.digest == model.digest
    assert ask(loaded) == ask(model)


def test_adapters_whose_rank_has_its_earlier_name(tmp_path):
    model = tiny_model()
    model.llm.add_lora(LoRA(r=2))
    model.save_pretrained(tmp_path / "m")
    description = json.loads((tmp_path / "m" / "config.json").read_text())
    description["lora"]["rank"] = description["lora"].pop("r")
    amend(tmp_path / "m", {"config.json": json.dumps(description).encode()})
    loaded = pal.load(tmp_path / "m")
    assert loaded.llm.lora == model.llm.lora
    assert loaded.digest == model.digest


def test_half_precision_on_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m", dtype=torch.float16)
    loaded = pal.load(tmp_path / "m")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_byte(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        pal.load(tmp_path / "m")


def test_another_format(tmp_path):
    from pal.files import atomic_folder

    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    description = json.loads((tmp_path / "m" / "config.json").read_text())
    with atomic_folder(tmp_path / "n") as folder:
        (folder / "config.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(BundleError, match="format 99"):
        pal.load(tmp_path / "n")


@pytest.mark.parametrize("path", ["no/such/folder", "/nowhere"])
def test_no_bundle(path):
    with pytest.raises(BundleError, match="not a bundle"):
        PalModel.from_pretrained(path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        pal.load(tmp_path)


def test_no_pickle(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    kinds = {path.suffix for path in (tmp_path / "m").rglob("*")}
    assert kinds <= {".json", ".safetensors", ".jinja"}


def test_what_was_trained_is_written_again_after_loading(tmp_path):
    """Trap: a loaded model must know which weights its LLM's source does not have."""
    model = tiny_model(llm=llm_folder(tmp_path / "llm"))
    with torch.no_grad():
        model.llm.lm.model.norm.weight.add_(0.5)
    model.trained.add("llm.lm.model.norm.weight")
    model.save_pretrained(tmp_path / "one")
    pal.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = pal.load(tmp_path / "two")
    assert again.digest == model.digest
    left_out = [set(json.loads((tmp_path / name / "config.json").read_text())["left_out"]) for name in ("one", "two")]
    assert left_out[0] == left_out[1] != set()
    # a full bundle, trained on: nobody says that its source has these weights
    model.save_pretrained(tmp_path / "full", full=True)
    whole = pal.load(tmp_path / "full")
    with torch.no_grad():
        whole.llm.lm.lm_head.weight.add_(0.5)
    whole.save_pretrained(tmp_path / "on")
    assert pal.load(tmp_path / "on").digest == whole.digest


def test_a_trained_encoder_is_written_again_after_loading(tmp_path):
    """Trap: a full bundle that is trained on: nobody says that the encoder's source has these weights."""
    model = tiny_model(encoders=[{"name": "whisper", "path": whisper_folder(tmp_path / "whisper")}], warm=False)
    model.save_pretrained(tmp_path / "full", full=True)
    whole = pal.load(tmp_path / "full")
    with torch.no_grad():
        next(whole.ears.encoders[0].parameters()).add_(0.5)
    whole.save_pretrained(tmp_path / "on")
    assert pal.load(tmp_path / "on").digest == whole.digest


def test_a_source_gives_weights_in_the_models_dtype(tmp_path):
    model = tiny_model(encoders=[{"name": "whisper", "path": whisper_folder(tmp_path / "whisper")}], warm=False)
    cast(model, torch.bfloat16)
    name = next(name for name in source_digests(model) if name.startswith("ears.encoders."))
    again = source_weights(model, {name})[name]
    assert again.dtype == torch.bfloat16 and again.equal(model.state_dict()[name])


def test_the_digest_covers_buffers():
    """What an encoder has learnt of its inputs' statistics changes answers as weights do."""
    model = tiny_model()
    before = model.digest
    names = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert names
    for name in names:
        buffer = model.get_buffer(name)
        was = buffer.clone()
        buffer.add_(1)
        assert model.digest != before, name
        buffer.copy_(was)
    assert model.digest == before


def test_heads_apart_from_tied_embeddings(tmp_path):
    fields = {"fresh": {**LLM, "tie_word_embeddings": True}}
    model = tiny_model(llm=fields)
    assert model.llm.lm.lm_head.weight is model.llm.lm.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    tied = pal.load(tmp_path / "tied")
    assert tied.llm.lm.lm_head.weight is tied.llm.lm.model.embed_tokens.weight
    model.llm.lm.lm_head.weight = torch.nn.Parameter(model.llm.lm.lm_head.weight.detach() * 2)
    model.save_pretrained(tmp_path / "m")
    loaded = pal.load(tmp_path / "m")
    assert loaded.digest == model.digest
    assert ask(loaded) == ask(model)


def test_more_rows_than_the_llms_source(tmp_path):
    """Tokens added to an LLM that lies elsewhere: only the new matrices are in the bundle."""
    model = tiny_model(llm=llm_folder(tmp_path / "llm"))
    torch.manual_seed(0)
    model.llm.resize_vocab(326)
    model.trained |= {"llm.lm.model.embed_tokens.weight", "llm.lm.lm_head.weight"}
    assert model.llm.vocab == 326
    model.save_pretrained(tmp_path / "m")
    loaded = pal.load(tmp_path / "m")
    assert loaded.digest == model.digest
    assert loaded.llm.vocab == 326


def test_bundles_of_earlier_versions_have_a_line_break_after_each_clip(tmp_path):
    """They do not say so; new models have none, so that the text is what the LLM would get without a clip."""
    model = tiny_model()
    assert model.config.after_clip == ""
    model.save_pretrained(tmp_path / "m")
    assert pal.load(tmp_path / "m").config.after_clip == ""
    description = json.loads((tmp_path / "m" / "config.json").read_text())
    del description["model"]["after_clip"]
    amend(tmp_path / "m", {"config.json": json.dumps(description).encode()})
    assert pal.load(tmp_path / "m").config.after_clip == "\n"
    assert read_architecture(tmp_path / "m")[0].after_clip == "\n"


def test_a_full_disk_is_one_line_and_leaves_the_old_bundle(tmp_path):
    model = tiny_model("lal")
    model.save_pretrained(tmp_path / "model")
    before = sha256(tmp_path / "model" / "manifest.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(PalError, match=r"cannot be written: .*; make room, or give another path"):
            model.save_pretrained(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sha256(tmp_path / "model" / "manifest.json") == before
