"""What a stage draws of its sources."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pal.data.manifest import Record, Turn, write_manifest
from pal.train import sampler
from pal.train.recipe import Recipe
from pal.train.sampler import Pool, Sampler
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


def sources(folder: Path, sizes: dict[str, int], **stage: Any) -> StageData:
    data = {}
    for name, size in sizes.items():
        records = [Record(f"{name}{i}", (f"{name}{i}.wav",), (Turn("?", "!"),), "t", "d") for i in range(size)]
        write_manifest(folder / f"{name}.jsonl", records)
        data[name] = {"manifest": folder / f"{name}.jsonl"} | stage.get("sources", {}).get(name, {})
    stage = {"train": {"encoder": True}, "lr": 1.0, "epochs": 1, "batch": {"rows": 5}} | stage
    stage.pop("sources", None)
    recipe = Recipe(model={"llm": "x", "encoders": ["tiny"], "integration": "lal"}, data=data, stages=[stage])
    return StageData(recipe, 0, open_sources(recipe, folder))


def drawn_of(data: StageData, epochs: int = 1) -> list[Counter[int]]:
    """How often each row of each source is drawn."""
    counts: list[Counter[int]] = [Counter() for _ in data.sources]
    for step in range(data.sampler.steps(epochs)):
        for group in data.sampler[step]:
            counts[group.source].update(group.rows)
    return counts


@pytest.mark.parametrize("temperature", [1, 2, 5, 1e9])
def test_temperature_flattens_the_mixture(tmp_path: Path, temperature: float) -> None:
    sizes = {"a": 400, "b": 100, "c": 25}
    counts = [sum(count.values()) for count in drawn_of(sources(tmp_path, sizes, temperature=temperature))]
    weights = [size ** (1 / temperature) for size in sizes.values()]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - 525 * weight / sum(weights)) <= 0.5
    if temperature == 1:
        assert counts == list(sizes.values())


def test_each_source_has_its_own_epochs(tmp_path: Path) -> None:
    repeats = {"a": {"repeat": 3}, "b": {"repeat": 0.5}}
    counts = drawn_of(sources(tmp_path, {"a": 7, "b": 10, "c": 4}, sources=repeats), epochs=2)
    assert [dict(count) for count in counts] == [dict.fromkeys(range(n), m) for n, m in ((7, 6), (10, 1), (4, 2))]


@pytest.mark.parametrize(("key", "value"), [("weight", 2), ("repeat", 2)])
def test_temperature_and_other_shares_exclude_each_other(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=f"'temperature' decides the shares, but source 'b' has '{key}'"):
        sources(tmp_path, {"a": 2, "b": 2}, temperature=2, sources={"b": {key: value}})
    with pytest.raises(ValidationError, match="temperature"):
        sources(tmp_path, {"a": 2, "b": 2}, temperature=0)


def test_runs_without_the_keys_keep_their_digest(tmp_path: Path) -> None:
    recipe = Recipe(
        model={"llm": "x", "encoders": ["tiny"], "integration": "lal"},
        data={"mine": {"manifest": "m.jsonl"}},
        stages=[{"train": {"encoder": True}, "lr": 1.0, "epochs": 1, "batch": {"rows": 5}}],
        keep={"loader": "processes"},
    )
    settings = recipe.settings()
    assert "table" not in settings["data"]["mine"] and "temperature" not in settings["stages"][0]
    assert "processes" not in str(settings)


@pytest.mark.parametrize(
    "batch", [{"rows": 7}, {"clips": 7}, {"clips": 7, "rows_per_clip": 2}, {"rows": 9, "clips": 7}]
)
def test_the_number_of_steps_is_that_of_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: dict[str, int]
) -> None:
    """The steps of an epoch are known without planning its rounds, where every batch but a round's last is full."""
    monkeypatch.setattr(sampler, "ROUND", 20)
    data = sources(tmp_path, {"a": 61, "b": 30}, batch=batch, sources={"a": {"repeat": 2}})
    groups = [[list(group) for group in pool.groups] for pool in data.pools]
    planned = Sampler(
        [Pool(g, p.weight, p.repeat) for g, p in zip(groups, data.pools, strict=True)], data.stage.batch, 0, 0
    )
    known = Sampler(data.pools, data.stage.batch, 0, 0)
    for epochs in (0.1, 1, 2.5):
        assert known.steps(epochs) == planned.steps(epochs)
    for step in (*range(planned.steps(1)), 77, 40):
        assert known[step] == planned[step]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_process_without_clips_of_its_own_counts_nothing(tmp_path: Path, accumulate: int) -> None:
    """One clip of a batch, for three processes: all run the same passes, and the clip counts once."""
    data = sources(tmp_path, {"a": 3}, batch={"clips": 1, "accumulate": accumulate})
    asked: list[list[bool]] = []
    for part in range(3):
        counts: list[bool] = []
        data.micro_batches(0, part, 3, lambda _, requests, to=counts: to.extend(c for _, c in requests) or [])
        asked.append(counts)
    assert [len(counts) for counts in asked] == [accumulate] * 3
    assert [sum(counts) for counts in asked] == [1, 0, 0]
