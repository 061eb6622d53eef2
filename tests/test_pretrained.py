"""Models known by name: found in the cache, else on the Hub; bundles hold the name."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

import pal
from pal.backbone.sources import load_tokenizer
from pal.backbone.tokenizer import train_tokenizer
from pal.bundle import source_digests
from pal.convert import convert
from pal.errors import BundleError, PalError
from pal.files import atomic_folder
from pal.hub_configs import config_of
from pal.model_config import ModelConfig
from pal.plan import plan
from pal.pretrained import KNOWN, SMOLLM2, WHISPER, cache_folder, folder_of, is_cached, remedy, source_of
from pal.registry import build
from pal.train.recipe import Recipe
from tests.app.test_cli import run, succeed
from tests.convert.files import llama, save_ct2, save_gguf, whisper
from tests.models import WORDS, noise

NAMES = {"llm": "smollm2-135m-instruct", "encoders": ["whisper-tiny.en"]}


def fill(cache: Path, scratch: Path) -> None:
    """Put tiny models into a cache under the two names."""
    scratch.mkdir()
    tokenizer = train_tokenizer(WORDS, 288)
    save_gguf(llama(len(tokenizer), tied=True), tokenizer, scratch / "x.gguf", "Q4_1")
    file = save_ct2(whisper(num_mel_bins=80, max_source_positions=100), scratch / "w")
    convert(scratch / "x.gguf", cache / "models" / SMOLLM2.name, "gguf")
    convert(file, cache / "models" / WHISPER.name, "ct2-whisper")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    fill(folder / "cache", folder / "scratch")
    return folder / "cache"


@pytest.fixture
def cache(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAL_CACHE", str(filled))
    return filled


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no Hub."""
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "empty"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("PAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("/home/me/.cache/pal")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/pal")
    monkeypatch.setenv("PAL_CACHE", "~/p")
    assert cache_folder() == Path("/home/me/p")
    assert folder_of("a") == Path("/home/me/p/models/a")


def test_sources(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for model in KNOWN.values():
        assert source_of(model.name) == str(cache / "models" / model.name)
        assert source_of(model.name, revision="main") == model.hub_id
        assert remedy(model.name) == ""
    for other in ("openai/whisper-tiny.en", "some/folder", "tiny"):
        assert source_of(other) == other and remedy(other) == ""
    assert source_of(Path("a/b")) == "a/b"
    monkeypatch.setenv("PAL_CACHE", str(tmp_path))
    (tmp_path / "models" / SMOLLM2.name).mkdir(parents=True)  # without a manifest: not complete
    for model in KNOWN.values():
        assert not is_cached(model.name)
        assert source_of(model.name) == model.hub_id
        assert remedy(model.name) == "; run: pal models get smol"


def test_the_short_form_of_the_encoder_is_whisper() -> None:
    parsed = ModelConfig.model_validate(NAMES)
    assert parsed.encoders == [{"name": "whisper", "path": "whisper-tiny.en"}]
    assert ModelConfig.model_validate({**NAMES, "encoders": ["tiny"]}).encoders == [{"name": "tiny"}]


def test_attach_plan_and_bundles_by_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SMOLLM2.name).mkdir()  # a folder of the same name is not meant
    monkeypatch.chdir(tmp_path)
    model = pal.attach(**NAMES, integration="lal")
    assert (model.llm.width, model.ears.encoders[0].width) == (64, 16)
    assert load_tokenizer(SMOLLM2.name)("yes").input_ids == model.tokenizer("yes").input_ids
    assert config_of(SMOLLM2.name)["hidden_size"] == 64
    assert config_of(WHISPER.name)["encoder_layers"] == 2
    stage = {"train": {"projectors": True}, "lr": 1, "steps": 1, "batch": {"rows": 1}}
    made = plan(Recipe(model={**NAMES, "integration": "lal"}, data={"x": {"manifest": "x"}}, stages=[stage]), seconds=1)
    assert made.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}

    model.save_pretrained("bundle")
    text = (tmp_path / "bundle" / "config.json").read_text()
    described = json.loads(text)["model"]
    assert (described["llm"]["path"], described["encoders"][0]["path"]) == (SMOLLM2.name, WHISPER.name)
    assert str(cache) not in text
    left_out = set(json.loads(text)["left_out"])
    assert left_out == set(source_digests(model)) and {name.split(".")[0] for name in left_out} == {"llm", "ears"}
    # on another machine the cache is elsewhere
    shutil.copytree(cache, tmp_path / "moved")
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "moved"))
    loaded = pal.load("bundle")
    assert loaded.digest == model.digest
    clip = (noise(0.5).numpy(), 16_000)
    assert loaded.ask(clip, "What is it?", max_new_tokens=3) == model.ask(clip, "What is it?", max_new_tokens=3)


def test_other_weights_in_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pal.attach(**NAMES, integration="lal")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("bundle")
    shutil.copytree(cache, tmp_path / "other")
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "other"))
    from safetensors.torch import load_file, save_file

    file = tmp_path / "other" / "models" / SMOLLM2.name / "model.safetensors"
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=r"of \d+ weights found in 'smollm2-135m-instruct' are not those of then;"):
        pal.load("bundle")
    with pytest.warns(pal.errors.WeightsWarning, match=r"differs most, by about 0\.00[12]\d* of its norm"):
        loaded = pal.load("bundle", other_weights=True)
    assert torch.equal(loaded.llm.lm.model.layers[0].mlp.up_proj.weight, tensors["model.layers.0.mlp.up_proj.weight"])
    soundfile.write("noise.wav", noise(0.5).numpy(), 16_000)
    asked = ("ask", "noise.wav", "What is it?", "--model", "bundle", "--max-new-tokens", "2")
    failed = run(*asked)  # its last line stands behind the bars of transformers
    assert failed.exit_code == 1 and "\nerror: bundle: " in failed.stderr and "--other-weights" in failed.stderr
    note = succeed(*asked, "--other-weights").stderr
    assert "\nnote: bundle: " in note and note.endswith("of its norm; answers will differ\n")
    clip = ("index", "noise.wav", "--out", "clip.safetensors", "--model", "bundle")
    assert run(*clip).exit_code == 1
    assert "answers will differ" in succeed(*clip, "--other-weights").stderr


def test_neither_in_the_cache_nor_on_the_hub(empty: Path, tmp_path: Path) -> None:
    for call in (
        lambda: pal.attach(llm=SMOLLM2.name, encoders=["tiny"]),
        lambda: load_tokenizer(SMOLLM2.name),
        lambda: build("encoder", {"name": "whisper", "path": WHISPER.name}),
    ):
        with pytest.raises(PalError) as caught:
            call()
        text = str(caught.value)
        assert text.endswith("; run: pal models get smol") and len(text) <= 300, text


def test_shapes_are_known_without_the_models(empty: Path) -> None:
    assert config_of(SMOLLM2.name) == config_of(SMOLLM2.hub_id)
    assert config_of(SMOLLM2.name)["hidden_size"] == 576
    assert config_of(WHISPER.name)["d_model"] == 384


def test_an_interrupted_replacement_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAL_CACHE", str(tmp_path))
    with atomic_folder(folder_of(WHISPER.name)) as folder:
        (folder / "config.json").write_text("{}")
    folder_of(WHISPER.name).rename(folder_of(f"{WHISPER.name}.old"))
    assert is_cached(WHISPER.name) and (folder_of(WHISPER.name) / "config.json").is_file()
