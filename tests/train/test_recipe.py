"""Recipes: strict, one line of error, overrides, and what a digest covers."""

from pathlib import Path

import pytest
import yaml

from pal.errors import ConfigError
from pal.train.recipe import Recipe, differences, load_recipe

BASE = {
    "seed": 3,
    "model": {"llm": {"path": "x/y"}, "encoders": ["tiny"], "integration": "lal"},
    "data": {"scenes": {"synth": {"scenes": 4}}, "clips": {"manifest": "clips.jsonl", "optional": True}},
    "stages": [
        {
            "name": "align",
            "train": {"connector": True, "projectors": "full"},
            "lr": 1e-3,
            "steps": 4,
            "batch": {"rows": 2},
        }
    ],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE))
    return file


def test_reads_what_was_written(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.seed == 3
    assert recipe.stages[0].train.projectors is True
    assert recipe.stages[0].train.llm == "none"
    assert list(recipe.stage_sources(recipe.stages[0])) == ["clips", "scenes"]


def test_overrides(path: Path) -> None:
    recipe = load_recipe(
        path, ["stages.0.lr=5e-4", "stages.0.train.llm=full", "keep.checkpoints=5", "stages.0.data={scenes: 2}"]
    )
    assert recipe.stages[0].lr == 5e-4
    assert recipe.stages[0].train.llm == "full"
    assert recipe.keep.checkpoints == 5
    assert recipe.stage_sources(recipe.stages[0])["scenes"].weight == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key 'sed'; known: .*seed"),
        ("stages.0.learning_rate=1", "unknown key 'stages.0.learning_rate'; known: .*lr"),
        ("stages.0.train.lora.rank=2", "unknown key .*; known: .*alpha"),
        ("stages.1.lr=1", "not an index"),
        ("stages.0.lr", "key=value"),
        ("seed.x=1", "no keys below it"),
        ("stages.0.epochs=1", "either 'steps' or 'epochs'"),
        ("stages.0.batch={}", "at least one of"),
        ("stages.0.lr={encoder: 1}", "no entry for 'connector'"),
        ("stages.0.lr={conector: 1}", "unknown part 'conector'"),
        ("stages.0.data=[scene]", "no data source 'scene'; known: clips, scenes"),
        ("stages.0.train={}", "names no part"),
        ("bundle=runs/x", "either 'model' or 'bundle'"),
        ("data.scenes.manifest=x.jsonl", "one of 'manifest', 'synth' and 'prepare'"),
    ],
)
def test_faults_are_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_the_digest_covers_what_decides_the_result(path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(path, ["keep.checkpoint_every=1", "notes=x"]).digest == recipe.digest
    other = load_recipe(path, ["stages.0.lr=2", "stages.0.train.llm=lora"])
    assert other.digest != recipe.digest
    assert differences(recipe.settings(), other.settings()) == ["stages.0.train.llm", "stages.0.lr"]
    assert Recipe(**recipe.settings()) == recipe
