"""Checkpoints are whole or absent, and a damaged one is noticed."""

import logging
from pathlib import Path

import pytest
import torch

from pal.errors import ConfigError
from pal.train import checkpoint
from pal.train.checkpoint import State
from pal.train.recipe import Recipe


def recipe(lr: float = 1.0) -> Recipe:
    return Recipe(
        model={"llm": "x/y", "encoders": ["tiny"]},
        data={"a": {"manifest": "a.jsonl"}},
        stages=[{"train": {"llm": "full"}, "lr": lr, "steps": 1, "batch": {"rows": 1}}],
    )


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    return checkpoint.save(
        folder, State(step=step, stage_step=step), recipe(), tensors, {"w/exp_avg": tensors["w"]}, keep
    )


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step0000002", "step0000010"]
    found = checkpoint.load_newest(tmp_path, recipe())
    assert found is not None
    assert found.state == State(step=10, stage_step=10)
    assert torch.equal(found.weights["w"], torch.full((3,), 10.0))
    assert torch.equal(found.optimizer["w/exp_avg"], torch.full((3,), 10.0))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_goes_back_one(tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_newest(tmp_path, recipe())
    assert found is not None
    assert found.state.step == 1
    assert "step0000002 is damaged" in caplog.text and "using the one before" in caplog.text


def test_without_an_intact_one_it_is_said_where_training_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (save(tmp_path, 1) / "weights.safetensors").unlink()
    assert checkpoint.load_newest(tmp_path, recipe()) is None
    assert "there is none before it" in caplog.text and "using the one before" not in caplog.text
    assert "holds no intact checkpoint; training begins at step 0" in caplog.text


def test_left_overs_of_a_kill_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step0000002.77.tmp").mkdir()
    (tmp_path / "step0000001").rename(tmp_path / "step0000001.old")
    found = checkpoint.load_newest(tmp_path, recipe())
    assert found is not None
    assert found.state.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step0000001"]


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "none", recipe()) is None


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"differs in: stages\.0\.lr\."):
        checkpoint.load_newest(tmp_path, recipe(lr=2.0))
