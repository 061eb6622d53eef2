"""What a stage draws of its sources."""

from pathlib import Path
from typing import Any

import pytest

from pal.data.manifest import Record, Turn, write_manifest
from pal.train.recipe import Recipe
from pal.train.sources import StageData, open_sources


@pytest.mark.parametrize(
    ("chosen", "drawn"),
    [
        ({}, {"a", "b", "c", "d"}),
        ({"tasks": ["what"]}, {"a", "b"}),
        ({"datasets": ["esc"]}, {"a", "c"}),
        ({"tasks": ["what"], "datasets": ["esc"]}, {"a"}),
    ],
)
@pytest.mark.parametrize("batch", [{"rows": 2}, {"clips": 2}], ids=str)
def test_only_records_of_the_named_tasks_and_datasets(
    tmp_path: Path, chosen: dict[str, Any], drawn: set[str], batch: dict[str, int]
) -> None:
    kinds = {"a": ("what", "esc"), "b": ("what", "fsd"), "c": ("when", "esc"), "d": ("when", "fsd")}
    write_manifest(
        tmp_path / "m.jsonl",
        [Record(name, (f"{name}.wav",), (Turn("?", "!"),), task, of) for name, (task, of) in kinds.items()],
    )
    stages = [{"train": {"encoder": True}, "lr": 1.0, "epochs": 2, "batch": batch}]
    recipe = Recipe(
        model={"llm": "x", "encoders": ["tiny"], "integration": "lal"},
        data={"mine": {"manifest": tmp_path / "m.jsonl", **chosen}},
        stages=stages,
    )
    data = StageData(recipe, 0, open_sources(recipe, tmp_path))
    assert {record.id for record in data.records()} == drawn
    rows = [row for step in range(data.steps) for group in data.sampler[step] for row in group.rows]
    assert len(rows) == 2 * len(drawn) and {data.manifests[0][row].id for row in rows} == drawn
