"""The scripts of `examples/`, each run once at the smallest size that shows it works."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from pal.data.manifest import Manifest
from pal.data.prepare import prepare
from pal.errors import ManifestError
from pal.registry import unregister

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two labels, eight clips each: a tone, and noise."""
    rng = np.random.default_rng(0)
    for label in ("high_tone", "noise"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for i in range(8):
            x = 0.1 * rng.standard_normal(8_000)
            if label == "high_tone":
                x = 0.3 * np.sin(2 * np.pi * (900 + 20 * i) * np.arange(8_000) / 16_000)
            soundfile.write(tmp_path / "sounds" / label / f"{i}.wav", x, 16_000)
    return tmp_path / "sounds"


def test_a_folder_of_clips_becomes_records(sounds: Path, tmp_path: Path) -> None:
    parts = {}
    for part in ("all", "train", "test"):
        records = list(Manifest(prepare("folder", sounds, tmp_path / f"{part}.jsonl", part=part, test_share=0.4)))
        parts[part] = {record.id for record in records}
        for record in records:
            assert record.choices == ("high tone", "noise")
            assert record.turns[0].answer == Path(record.clips[0]).parent.name.replace("_", " ")
    assert len(parts["all"]) == 16 and parts["train"] and parts["test"]
    assert parts["train"] | parts["test"] == parts["all"] and not parts["train"] & parts["test"]


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    soundfile.write(tmp_path / "one" / "a.wav", np.zeros(100), 16_000)
    with pytest.raises(ManifestError, match="one folder of clips for each label"):
        prepare("folder", tmp_path, tmp_path / "out.jsonl")


def test_own_sounds(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("own_sounds").main(str(sounds), str(tmp_path / "run"), steps=2)
    assert re.search(r"\d+ held-out clips: \d\.\d\d", capsys.readouterr().out)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_own_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        script("own_encoder").main()
    finally:
        unregister("encoder", "bands")
    assert "25 tokens of 1 s" in capsys.readouterr().out


def test_compare_integrations(capsys: pytest.CaptureFixture[str]) -> None:
    script("compare_integrations").main("plits", "lal", steps=2, scenes=8, held_out=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "without audio" in line] == ["plits", "lal"]
