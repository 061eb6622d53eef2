"""Augmentation that may cut out what a label is about is refused before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pal.config import parse
from pal.data.augment import Augment
from pal.data.manifest import Record, Turn, write_manifest
from pal.errors import ConfigError
from pal.train.recipe import Recipe
from pal.train.sources import open_sources
from pal.types import TagSpan

TIMED = TagSpan("dog", 0.5, 1.0)
HEAR = {"objective": "tags", "train": {"encoder": True}}
ANSWER = {"objective": "answers", "train": {"connector": True}}
READ = {"objective": "text", "train": {"llm": "full"}}
CROP, SHIFT, WRAP = {"crop_seconds": 1.0}, {"time_shift": 1.0}, {"time_shift": 1.0, "wrap": True}


def recipe(folder: Path, stage: dict[str, Any], augment: dict[str, Any], *records: Record, **source: Any) -> Recipe:
    write_manifest(folder / "m.jsonl", records)
    data = {"mine": {"manifest": folder / "m.jsonl", "augment": augment, **source}}
    stages = [{**stage, "lr": 1.0, "steps": 1, "batch": {"clips": 1}}]
    return Recipe(model={"llm": "x", "encoders": ["tiny"], "integration": "lal"}, data=data, stages=stages)


def record(*tags: TagSpan, name: str = "r1", task: str = "t", known: bool = True) -> Record:
    return Record(name, ("a.wav",), (Turn("What is it?", "a dog"),), task, "d", tags=tags if known else None)


@pytest.mark.parametrize("augment", [CROP, SHIFT], ids=str)
@pytest.mark.parametrize(
    ("stage", "records", "what"),
    [
        (ANSWER, [record(TIMED)], "'r1': '{}' may cut out what the answer 'a dog' is about"),
        (
            HEAR,
            [record(TIMED), record(TagSpan("cat"), name="r2")],
            "'r2': '{}' may cut out what the label 'cat' is about",
        ),
        (HEAR, [record(TagSpan("cat", 0.5))], "'r1': '{}' may cut out what the label 'cat' is about"),
        (HEAR, [record(known=False)], "'r1': '{}' may cut out what a clip without tags is about"),
    ],
    ids=["an answer", "no times", "no end", "no tags"],
)
def test_cuts_are_refused(
    tmp_path: Path, augment: dict[str, Any], stage: dict[str, Any], records: list[Record], what: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_sources(recipe(tmp_path, stage, augment, *records), tmp_path)
    said = str(caught.value)
    assert said.startswith("data 'mine', record " + what.format(next(iter(augment))))
    assert "leave it out" in said and len(said) <= 300 and "\n" not in said


@pytest.mark.parametrize(
    ("stage", "augment"), [(HEAR, CROP), (HEAR, SHIFT), (ANSWER, WRAP), (ANSWER, {"speed": [0.9, 1.1]}), (READ, CROP)]
)
def test_what_keeps_labels_true_is_taken(tmp_path: Path, stage: dict[str, Any], augment: dict[str, Any]) -> None:
    made = recipe(tmp_path, stage, augment, record(TIMED), record(name="quiet"))
    assert len(open_sources(made, tmp_path)["mine"]) == 2


def test_records_that_are_not_drawn_are_not_looked_at(tmp_path: Path) -> None:
    records = [record(TIMED, task="good"), record(TagSpan("cat"), name="r2", task="other")]
    open_sources(recipe(tmp_path, HEAR, CROP, *records, tasks=["good"]), tmp_path)
    with pytest.raises(ConfigError, match="'r2'"):
        open_sources(recipe(tmp_path, HEAR, CROP, *records, tasks=["good", "other"]), tmp_path)


def test_a_long_label_keeps_the_line_short(tmp_path: Path) -> None:
    long = record(TagSpan("x" * 500), name="n" * 500)
    with pytest.raises(ConfigError) as caught:
        open_sources(recipe(tmp_path, HEAR, SHIFT, long), tmp_path)
    assert len(str(caught.value)) <= 300


def test_unknown_options_are_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.mine\.augment.*unknown key 'volume'"):
        open_sources(recipe(tmp_path, HEAR, {"volume": 1}, record(TIMED)), tmp_path)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("pal/assets/*.yaml")]), ids=str)
def test_our_own_recipes_cut_nothing(path: Path) -> None:
    for source in (yaml.safe_load(path.read_text()).get("data") or {}).values():
        if "augment" in source:
            assert parse(Augment.Config, source["augment"], where=str(path)).cuts is None
