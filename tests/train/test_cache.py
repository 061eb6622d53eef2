"""Training from features that are kept: the run without them, without the encoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pal.data.synth import synthesise
from pal.encoders.tiny import Tiny
from pal.encoders.whisper import Whisper
from pal.errors import BundleError, ConfigError
from pal.model import PalModel
from pal.registry import toy
from pal.train import run
from pal.train.curves import read_log
from pal.train.recipe import load_recipe
from pal.train.step import Update
from tests.train.tiny import MODEL, failing_after, recipe

TRAIN = {"connector": True, "projectors": True, "llm": "lora"}
ALONE = {"clips": 3, "rows_per_clip": 2, "accumulate": 3}
"""Each part of a batch has one clip, so that the encoders take it by itself, as they do for the cache."""
TOGETHER = {"clips": 4, "rows_per_clip": 2, "bucket": 2}
ENCODERS = {
    "one": {"encoders": MODEL["encoders"]},
    "two": {"encoders": [*MODEL["encoders"], toy("encoder", "whisper")]},
    "fused": {
        "encoders": [*MODEL["encoders"], toy("encoder", "whisper")],
        "connector": {"name": "lfst", "width": 16, "heads": 2, "layers": 1},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sources whose clips differ in length; those of the last are longer than a window of the toy whisper."""
    folder = tmp_path_factory.mktemp("lengths")
    lengths = {"short": 1.5, "middle": 2.3, "long": 4.6}
    for i, (name, seconds) in enumerate(lengths.items()):
        synthesise(folder / name, scenes=3, seed=i, seconds=seconds, questions_per_scene=2, workers=1)
    return {name: {"manifest": str(folder / name / "manifest.jsonl")} for name in lengths}


def train(
    data: dict[str, Any],
    out: Path,
    encoders: str,
    cache: Path | None,
    resume: bool = False,
    keep: dict[str, int] | None = None,
    **fields: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    stage = {"train": TRAIN, "lr": 1e-2, "epochs": 2, "batch": ALONE} | fields
    if cache is not None:
        stage["cache"] = str(cache)
    model = MODEL | ENCODERS[encoders]
    run(recipe(Path(), [stage], model=model, data=data, keep={"log_every": 1} | (keep or {})), out, resume)
    losses = [line["loss"] for line in read_log(out / "log.jsonl")]
    return losses, PalModel.from_pretrained(out / "model").state_dict()


def assert_same(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert [name for name in a[1] if not torch.equal(a[1][name], b[1][name])] == []


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on encoders and decoders raise."""
    for encoder in (Tiny, Whisper):
        monkeypatch.setattr(encoder, "forward", None)
    monkeypatch.setattr("pal.audio.load", None)
    monkeypatch.setattr("pal.audio.waveform.load", None)


def test_the_same_run_bit_for_bit(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(data, tmp_path / "plain", "two", None)
    cold = train(data, tmp_path / "cold", "two", tmp_path / "cache")
    assert len(set(plain[0])) == len(plain[0]) == 6
    assert_same(cold, plain)
    assert len(list((tmp_path / "cache").glob("??/*"))) == 9
    deaf(monkeypatch)
    assert_same(train(data, tmp_path / "warm", "two", tmp_path / "cache"), plain)


def test_batches_of_mixed_lengths_to_rounding(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not bit for bit: without the cache the encoders' sums are those of a padded batch, in another order."""
    plain = train(data, tmp_path / "plain", "fused", None, batch=TOGETHER)
    cold = train(data, tmp_path / "cold", "fused", tmp_path / "cache", batch=TOGETHER)
    assert cold[0] == pytest.approx(plain[0], rel=1e-4)
    deaf(monkeypatch)
    # with the cache it is one run, whatever was in the folder before it began and however many threads load
    warm = train(data, tmp_path / "warm", "fused", tmp_path / "cache", batch=TOGETHER, keep={"workers": 3})
    assert_same(warm, cold)


@pytest.mark.parametrize("emptied", [False, True])
def test_resumed(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emptied: bool) -> None:
    whole = train(data, tmp_path / "whole", "two", tmp_path / "cache", batch=TOGETHER)
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(3))
        train(data, tmp_path / "cut", "two", tmp_path / "cache", batch=TOGETHER, keep={"checkpoint_every": 2})
    if emptied:
        shutil.rmtree(tmp_path / "cache")
    assert_same(train(data, tmp_path / "cut", "two", tmp_path / "cache", resume=True, batch=TOGETHER), whole)


def test_an_encoder_that_was_trained_first(data: dict[str, Any], tmp_path: Path) -> None:
    """The digest is of the weights as they are when the stage begins."""
    hear = {"name": "hear", "train": {"encoder": True, "connector": True}, "lr": 1e-2, "steps": 1, "batch": ALONE}
    join = {"name": "join", "train": TRAIN, "lr": 1e-2, "steps": 1, "batch": ALONE, "cache": str(tmp_path / "cache")}
    run(recipe(Path(), [hear, join], data=data), tmp_path / "a")
    with pytest.raises(BundleError, match="encoder 0 \\(Tiny\\) with other weights"):
        run(recipe(Path(), [join], data=data), tmp_path / "b")


def test_a_damaged_entry_stops_the_run(data: dict[str, Any], tmp_path: Path) -> None:
    train(data, tmp_path / "a", "one", tmp_path / "cache", epochs=1)
    entry = next((tmp_path / "cache").glob("??/*"))
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{entry.name}: damaged .*delete it and it is made anew"):
        train(data, tmp_path / "b", "one", tmp_path / "cache", epochs=1)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"train": {"encoder": True}}, "'cache' needs frozen encoders, but the stage trains an encoder"),
        ({"train": {"encoder": [0], "llm": "full"}}, "'cache' needs frozen encoders"),
        ({"objective": "text", "train": {"llm": "full"}}, "objective 'text' uses no frozen encoder"),
        ({"objective": "transcript", "train": {"llm": "full"}}, "objective 'transcript' uses no frozen encoder"),
    ],
)
def test_stages_that_cannot_use_one(tmp_path: Path, fields: dict[str, Any], fault: str) -> None:
    stage = {"train": TRAIN, "lr": 1e-2, "steps": 2, "batch": {"rows": 2}, "cache": "features"} | fields
    plain = {"manifest": "m.jsonl"}
    made = recipe_of(tmp_path, data={"plain": plain}, stages=[stage])
    with pytest.raises(ConfigError, match=fault):
        load_recipe(made)


def test_augmented_sources_cannot_be_kept(tmp_path: Path) -> None:
    stage = {"train": TRAIN, "lr": 1e-2, "steps": 2, "batch": {"rows": 2}, "cache": "features"}
    data = {"plain": {"manifest": "m.jsonl"}, "changed": {"manifest": "m.jsonl", "augment": {"speed": [0.9, 1.1]}}}
    with pytest.raises(ConfigError, match=r"stages\.0: .* source 'changed' has 'augment'; remove one of them"):
        load_recipe(recipe_of(tmp_path, data=data, stages=[stage]))
    load_recipe(recipe_of(tmp_path, data=data, stages=[stage | {"data": ["plain"]}]))


def test_text_alone_has_no_lengths(tmp_path: Path) -> None:
    batch = {"rows": 2, "bucket": 5}
    stage = {"objective": "text", "train": {"llm": "full"}, "lr": 1e-2, "steps": 2, "batch": batch}
    with pytest.raises(ConfigError, match="objective 'text' has no audio to sort by length; remove 'bucket'"):
        load_recipe(recipe_of(tmp_path, data={"plain": {"manifest": "m.jsonl"}}, stages=[stage]))


def recipe_of(folder: Path, **fields: Any) -> Path:
    """A recipe as a file."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": MODEL} | fields))
    return path
