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
        ("data.scenes.manifest=x.jsonl", "one of 'manifest', 'table', 'synth' and 'prepare'"),
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


def write(folder: Path, name: str, data: dict[str, object]) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data))
    return file


def test_extends_merges_key_by_key(path: Path) -> None:
    own = {
        "extends": path.name,
        "seed": 9,
        "model": {"system": "Listen."},
        "data": {"clips": {"optional": False}, "more": {"manifest": "more.jsonl"}},
    }
    recipe = load_recipe(write(path.parent, "own.yaml", own))
    assert recipe.seed == 9
    assert recipe.model is not None
    assert recipe.model.system == "Listen." and recipe.model.llm.path == "x/y"
    assert set(recipe.data) == {"scenes", "clips", "more"}
    assert recipe.data["clips"].manifest == Path("clips.jsonl") and not recipe.data["clips"].optional
    assert recipe.stages == load_recipe(path).stages


def test_extends_replaces_lists(path: Path) -> None:
    stage = {"name": "own", "train": {"projectors": True}, "lr": 1.0, "steps": 1, "batch": {"clips": 1}}
    own = {"extends": path.name, "model": {"encoders": ["tiny", "tiny"]}, "stages": [stage]}
    recipe = load_recipe(write(path.parent, "own.yaml", own))
    assert [stage.name for stage in recipe.stages] == ["own"]
    assert recipe.stages[0].batch.rows is None
    assert recipe.model is not None and len(recipe.model.encoders) == 2


def test_extends_replaces_a_part_of_another_name(path: Path) -> None:
    base = {"extends": path.name, "model": {"integration": {"name": "lal", "layers": "first_third", "hidden": 8}}}
    write(path.parent, "base.yaml", base)

    def integration(value: object) -> object:
        own = {"extends": "base.yaml", "model": {"integration": value}}
        recipe = load_recipe(write(path.parent, "own.yaml", own))
        assert recipe.model is not None
        return recipe.model.integration

    assert integration({"name": "pal"}) == {"name": "pal"}
    assert integration("plits") == {"name": "plits"}
    assert integration({"name": "lal", "layers": "all"}) == {"name": "lal", "layers": "all", "hidden": 8}
    assert integration({"hidden": 4}) == {"name": "lal", "layers": "first_third", "hidden": 4}


def test_later_bases_and_the_recipe_itself_have_the_last_word(path: Path) -> None:
    write(path.parent, "a.yaml", {"seed": 5, "notes": "a", "keep": {"workers": 2}})
    write(path.parent, "sub/b.yaml", {"extends": "../c.yaml", "notes": "b", "keep": {"prefetch": 7}})
    write(path.parent, "c.yaml", {"seed": 6, "notes": "c"})
    own = write(path.parent, "own.yaml", {"extends": [path.name, "a.yaml", "sub/b.yaml"], "keep": {"workers": 4}})
    recipe = load_recipe(own)
    assert (recipe.seed, recipe.notes) == (6, "b")
    assert (recipe.keep.workers, recipe.keep.prefetch) == (4, 7)
    assert load_recipe(own, ["seed=1"]).seed == 1


def test_a_base_may_be_named_twice(path: Path) -> None:
    write(path.parent, "left.yaml", {"extends": path.name, "seed": 1})
    write(path.parent, "right.yaml", {"extends": path.name, "notes": "right"})
    own = write(path.parent, "own.yaml", {"extends": ["left.yaml", "right.yaml"]})
    # the right one's own base has the last word over the left one
    assert (load_recipe(own).seed, load_recipe(own).notes) == (3, "right")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("own.yaml", r"own.yaml: extends itself"),
        ("loop.yaml", r"own.yaml: extends itself"),
        ("none.yaml", r"none.yaml: No such file"),
        (["recipe.yaml", "none.yaml"], r"none.yaml: No such file"),
        (3, r"'extends' takes a file name or a list of them"),
        ([["recipe.yaml"]], r"'extends' takes a file name or a list of them"),
        ("wrong.yaml", r"own.yaml: unknown key 'sed'; known: .*seed"),
    ],
)
def test_faults_of_extends_are_one_line(path: Path, extends: object, message: str) -> None:
    write(path.parent, "loop.yaml", {"extends": "own.yaml"})
    write(path.parent, "wrong.yaml", {"extends": path.name, "sed": 1})
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(write(path.parent, "own.yaml", {"extends": extends}))
    assert "\n" not in str(caught.value)
