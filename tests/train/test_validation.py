"""Validation: held-out questions, the best weights, an early stop; and a run that validates trains as one that does not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pal.data.manifest import Manifest
from pal.errors import ConfigError
from pal.evaluate import evaluate
from pal.model import PalModel
from pal.train import Trainer, run
from pal.train.checkpoint import load_newest
from pal.train.curves import read_log
from pal.train.distributed import HostReduce
from pal.train.held_out import held_out
from pal.train.recipe import Recipe
from pal.train.sources import StageData, open_sources
from pal.train.step import Update
from pal.train.validation import ValidationScore, best_score, ends_early
from pal.train.validator import Validator
from tests.train.tiny import MODEL, failing_after, recipe

STAGE: dict[str, Any] = {
    "name": "join",
    "train": {"encoder": True, "connector": True, "projectors": True, "llm": "full"},
    "lr": 1e-2,
    "steps": 6,
    "batch": {"clips": 2, "rows_per_clip": 2},
}


def made(manifest: Path, validation: dict[str, Any] | None, stages: Any = (STAGE,), **fields: Any) -> Recipe:
    data = {"scenes": {"manifest": str(manifest)}}
    return recipe(manifest, [*stages], data=data, validation=validation, **fields)


SHORT = [STAGE | {"steps": 1}]


def closed(manifest: Path) -> set[str]:
    """Ids of the records with choices; the others are no questions of exact match."""
    return {record.id for record in Manifest(manifest) if record.choices}


def weights(model: PalModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def validations(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "train.json").read_text())["validations"]
    return found


# What follows from the accuracies


def scores(*accuracies: float, stage: int = 0) -> list[ValidationScore]:
    return [
        {"stage": stage, "step": step, "accuracy": value, "questions": 9}
        for step, value in enumerate(accuracies, start=1)
    ]


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 4))
def test_the_best_is_the_first_of_the_highest_and_patience_counts_from_it(values: list[int], patience: int) -> None:
    own, other = scores(*values, stage=1), scores(9, 9, 9, 9, 9)
    best = best_score([*other, *own], 1)
    if not values:
        assert best is None and not ends_early([*other, *own], 1, patience)
        return
    assert best == own[values.index(max(values))]
    assert ends_early([*other, *own], 1, patience) == (len(values) - best["step"] >= patience)
    assert not ends_early([*other, *own], 1, None)


# What is held out


def test_a_share_is_of_clips_that_no_stage_trains_on(manifest: Path, tmp_path: Path) -> None:
    tags = STAGE | {"name": "hear", "objective": "tags", "train": {"encoder": True}}
    recipe_ = made(manifest, {"share": 0.4, "every": 2}, [tags, STAGE])
    manifests = open_sources(recipe_, tmp_path)
    records = [*manifests["scenes"]]
    rows = held_out(recipe_, manifests["scenes"])
    clips = {records[row].clips for row in rows}
    assert 0 < len(clips) < 8
    assert rows == {row for row, record in enumerate(records) if record.clips in clips}
    for index in (0, 1):
        trained = {record.clips for record in StageData(recipe_, index, manifests).records()}
        assert trained == {record.clips for record in records} - clips
    assert recipe_.validation is not None
    asked = Validator(recipe_.validation, recipe_, manifests, HostReduce(1)).items
    assert {item.clips for item in asked} == clips
    assert {item.id for item in asked} == {records[row].id for row in rows} & closed(manifest)


def test_the_same_clips_are_held_out_in_another_folder_and_most_shares_are_near(tmp_path: Path) -> None:
    line = '{{"audio_id": "clips/{}.wav", "instruction": "q", "output": "a"}}\n'
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.jsonl").write_text("".join(line.format(i) for i in range(2000)))
    manifest = tmp_path / "a" / "m.jsonl"
    rows = [
        held_out(made(manifest, {"share": share, "every": 1}), Manifest(tmp_path / name / "m.jsonl"))
        for name, share in (("a", 0.1), ("b", 0.1), ("a", 0.2))
    ]
    assert rows[0] == rows[1] and rows[0] < rows[2]
    assert 150 < len(rows[0]) < 250 and 340 < len(rows[2]) < 460
    assert held_out(made(manifest, None), Manifest(manifest)) == frozenset()


def test_questions_are_drawn_once_by_the_seed(manifest: Path, tmp_path: Path) -> None:
    def asked(seed: int, questions: int) -> set[str]:
        one = made(manifest, {"manifest": str(manifest), "every": 1, "questions": questions}, seed=seed)
        assert one.validation is not None
        items = Validator(one.validation, one, {}, HostReduce(1)).items
        assert len(items) == min(questions, len(closed(manifest)))
        return {item.id for item in items}

    assert asked(1, 5) == asked(1, 5) != asked(2, 5)
    assert asked(1, 100) == closed(manifest)


def test_accuracy_is_the_evaluators(manifest: Path, tmp_path: Path) -> None:
    one = made(manifest, {"manifest": str(manifest), "every": 1, "no_audio": True, "samples": 2, "questions": 4}, SHORT)
    assert one.validation is not None
    asked = {item.id for item in Validator(one.validation, one, {}, HostReduce(1)).items}
    model = run(one, tmp_path)
    result = evaluate(model, [record for record in Manifest(manifest) if record.id in asked], progress=False)
    line = read_log(tmp_path / "log.jsonl")[-1]["validation"]
    assert line["accuracy"] == result.score == validations(tmp_path)[-1]["accuracy"]
    assert line["no_audio_accuracy"] == result.overall.no_audio_score
    by_question = {(item.prompt, item.output) for item in result.items}
    assert len(line["samples"]) == 2
    for sample in line["samples"]:
        assert (sample["question"], sample["answer"]) in by_question and sample["expected"]
    assert [score["step"] for score in validations(tmp_path)] == [1]


# The run


def test_validation_changes_nothing_in_training(manifest: Path, tmp_path: Path) -> None:
    """Dropout, batch statistics and gradient checkpointing included."""
    model = MODEL | {"llm": {**MODEL["llm"], "fresh": {**MODEL["llm"]["fresh"], "attention_dropout": 0.2}}}  # type: ignore[dict-item]
    stage = STAGE | {"gradient_checkpointing": True}
    with_it = made(
        manifest,
        {"manifest": str(manifest), "every": 1, "model": "last", "questions": 2, "max_new_tokens": 3},
        [stage],
        model=model,
    )
    without = made(manifest, None, [stage], model=model)
    assert_equal(weights(run(with_it, tmp_path / "with")), weights(run(without, tmp_path / "without")))
    losses = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("with", "without")]
    assert losses[0] == losses[1]


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """Accuracy after each step in place of the model's; each asks for the step of the run that is trained."""
    told: dict[int, float] = {}
    seen: list[Any] = []
    call = Validator.__call__

    def noted(self: Validator, model: PalModel, state: Any, *given: Any) -> Any:
        seen.append(state.step)
        return call(self, model, state, *given)

    def given_ones(self: Validator, model: PalModel) -> dict[str, Any]:
        return {"accuracy": told[seen[-1]], "samples": []}

    monkeypatch.setattr(Validator, "__call__", noted)
    monkeypatch.setattr(Validator, "ask", given_ones)
    yield told


SMALL = {"every": 1, "questions": 2, "samples": 0}


def stepped(one: Recipe, out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """Weights after all steps; no bundle is written."""
    trainer = Trainer(one, out, resume=resume)
    for _ in trainer.steps():
        pass
    return weights(trainer.model)


def after(manifest: Path, out: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights after so many steps without validation."""
    trainer = Trainer(made(manifest, None), out)
    for step in trainer.steps():
        if step == steps:
            break
    return weights(trainer.model)


@pytest.mark.parametrize("model", ["best", "last"])
def test_a_stage_ends_with_its_best_weights(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float], model: str
) -> None:
    accuracies.update({1: 0.1, 2: 0.3, 3: 0.6, 4: 0.5, 5: 0.6, 6: 0.2})
    one = made(manifest, {"manifest": str(manifest), "model": model, **SMALL})
    trained = weights(run(one, tmp_path / "run"))
    assert_equal(trained, after(manifest, tmp_path / "reference", 3 if model == "best" else 6))
    assert_equal(weights(PalModel.from_pretrained(tmp_path / "run" / "model")), trained)
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["step0000003"]
    (stage,) = json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
    assert stage.get("weights_of_step") == (3 if model == "best" else None)


def test_patience_ends_a_stage_and_the_next_one_starts_from_its_best(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float]
) -> None:
    accuracies.update({1: 0.1, 2: 0.3, 3: 0.3, 4: 0.2})
    one = made(manifest, {"manifest": str(manifest), "patience": 2, **SMALL})
    steps = list(Trainer(one, tmp_path / "run").steps())
    assert steps == [1, 2, 3, 4]
    assert_equal(weights(run(one, tmp_path / "run", resume=True)), after(manifest, tmp_path / "reference", 2))
    second = STAGE | {"name": "more", "lr": 0.0, "weight_decay": 0.0, "steps": 1, "train": {"projectors": True}}
    limited = {"manifest": str(manifest), "patience": 2, "stages": ["join"], **SMALL}
    trained = stepped(made(manifest, limited, [STAGE, second]), tmp_path / "two")
    wanted = after(manifest, tmp_path / "again", 2)
    assert [name for name in wanted if "running" not in name and not torch.equal(wanted[name], trained[name])] == []


@pytest.mark.parametrize("at", [3, 5])
def test_a_cut_run_goes_on_to_the_same_choice(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Checkpoints are those of steps 2 and 4: what was the best after them is tried again."""
    accuracies.update({1: 0.1, 2: 0.5, 3: 0.7, 4: 0.6, 5: 0.8, 6: 0.2})
    one = made(manifest, {"manifest": str(manifest), "patience": 3, **SMALL})
    wanted = weights(run(one, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(at))
        run(one, tmp_path / "cut")
    assert_equal(weights(run(one, tmp_path / "cut", resume=True)), wanted)
    assert validations(tmp_path / "cut") == validations(tmp_path / "whole")
    found = load_newest(tmp_path / "cut" / "best", one)
    assert found is not None and found.state.step == 5


def test_the_best_weights_that_a_checkpoint_knows_outlive_later_ones(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after a better validation than the checkpoint's, and not as good when it is repeated, as on a GPU."""
    accuracies.update({1: 0.1, 2: 0.5, 3: 0.7, 4: 0.2, 5: 0.1, 6: 0.2})
    one = made(manifest, {"manifest": str(manifest), **SMALL})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(3))
        run(one, tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / "best").iterdir()) == ["step0000002", "step0000003"]
    accuracies[3] = 0.3
    assert_equal(stepped(one, tmp_path / "cut", resume=True), after(manifest, tmp_path / "reference", 2))


def test_an_earlier_best_does_not_stand_in_for_one_that_is_damaged(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    """Before the next checkpoint the weights of both are there."""
    accuracies.update({1: 0.1, 2: 0.5, 3: 0.9, 4: 0.2, 5: 0.2, 6: 0.2})
    one = made(manifest, {"manifest": str(manifest), **SMALL}, keep={"checkpoint_every": 100})
    trainer = Trainer(one, tmp_path / "run")
    for step in trainer.steps():
        if step == 5:
            assert len(list((tmp_path / "run" / "best").iterdir())) == 3
            for path in (tmp_path / "run" / "best" / "step0000003").glob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])
    assert "the best weights, of step 3, are damaged or missing; the last are kept" in caplog.text
    assert_equal(weights(trainer.model), after(manifest, tmp_path / "reference", 6))


def test_best_weights_that_are_damaged_are_not_taken(
    manifest: Path, tmp_path: Path, accuracies: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    accuracies.update(dict(enumerate([0.9, 0.3, 0.3, 0.3, 0.3, 0.3], start=1)))
    trainer = Trainer(made(manifest, {"manifest": str(manifest), **SMALL}), tmp_path / "run")
    for step in trainer.steps():
        if step == 5:
            for path in (tmp_path / "run" / "best" / "step0000001").glob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])
    assert "the best weights, of step 1, are damaged or missing; the last are kept" in caplog.text
    assert_equal(weights(trainer.model), after(manifest, tmp_path / "reference", 6))


@pytest.mark.parametrize(
    ("validation", "says"),
    [
        ({"every": 1}, "give either 'manifest' or 'share'"),
        ({"every": 1, "share": 0.1, "root": "x"}, "'root' belongs to a 'manifest'"),
        ({"every": 1, "share": 0.1, "stages": ["x"]}, "validation: no stage 'x'; known: join"),
    ],
)
def test_settings_that_do_not_fit(manifest: Path, validation: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(manifest, validation)


def test_data_that_are_not_there(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation: no '.*none\.jsonl'; correct the path"):
        run(made(manifest, {"manifest": str(tmp_path / "none.jsonl"), "every": 1}), tmp_path / "a")
    with pytest.raises(ConfigError, match="holds out no clip; set a larger 'share'"):
        run(made(manifest, {"share": 1e-9, "every": 1}), tmp_path / "b")


def test_other_questions_are_other_data(manifest: Path, tmp_path: Path) -> None:
    copy = tmp_path / "held.jsonl"
    copy.write_text(manifest.read_text())
    one = made(manifest, {"manifest": str(copy), "root": str(manifest.parent), "every": 9, "questions": 2})
    next(iter(Trainer(one, tmp_path / "run").steps()))
    trainer = Trainer(one, tmp_path / "run", resume=True)
    trainer.stop()
    with pytest.raises(SystemExit):
        list(trainer.steps())
    copy.write_text("\n".join(manifest.read_text().splitlines()[:-1]))
    with pytest.raises(ConfigError, match=r"data 'validation\.manifest' changed since"):
        run(one, tmp_path / "run", resume=True)


def test_a_recipe_without_validation_has_the_digest_it_had(manifest: Path) -> None:
    assert "validation" not in made(manifest, None).settings()
    assert made(manifest, None).digest != made(manifest, {"share": 0.1, "every": 1}).digest
