"""`pal runs`: what is found below a folder, what is said of each run, and where runs differ."""

import json

import pytest

from pal.errors import ConfigError
from pal.evaluate.result import MetricValue, Result
from pal.report.runs import find_runs
from pal.train.recipe import Recipe
from tests.app.test_cli import run as pal_command

STAGE = {"name": "joint", "train": {"projectors": True}, "lr": 1e-3, "steps": 4, "batch": {"rows": 2}}


def recipe_of(lr=1e-3, seed=0):
    return Recipe(bundle="tiny", data={"a": {"manifest": "a.jsonl"}}, stages=[{**STAGE, "lr": lr}], seed=seed)


def write_run(folder, losses, finished=True, validation=(), **settings):
    """A run folder as the trainer writes it."""
    folder.mkdir(parents=True)
    recipe = recipe_of(**settings)
    (folder / "recipe.json").write_text(json.dumps({"digest": recipe.digest, "recipe": recipe.settings()}))
    lines = [{"step": i, "stage": "joint", "loss": loss, "seconds": 2.0 * i} for i, loss in enumerate(losses, 1)]
    for line, accuracy in zip(lines, validation, strict=False):
        line["validation"] = {"scenes": {"accuracy": accuracy, "loss": 9.0}}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        stage = {"name": "joint", "objective": "answers", "steps": len(losses), "seconds": 7.5, "loss": losses[-1]}
        stage |= {"trained_parameters": 3, "median_step_seconds": 0.1}
        report = {"recipe": recipe.settings(), "stages": [stage], "seconds": 7.5, "device": "cpu"}
        (folder / "train.json").write_text(json.dumps(report))
    return folder


def write_score(path, score, benchmark="held_out"):
    result = Result(benchmark, "accuracy", MetricValue(4, score), {}, {}, {}, {}, [], {}, {}, "bootstrap")
    path.parent.mkdir(exist_ok=True)
    result.save(path)


@pytest.fixture
def folder(tmp_path):
    """Two runs, one of them deep below and unfinished, a damaged one, and what is none."""
    root = tmp_path / "runs"
    one = write_run(root / "one", [3.0, 2.0, 1.5], validation=[0.2, 0.6, 0.4])
    write_score(one / "score.json", 0.75)
    write_score(one / "again" / "score.json", 0.5)
    write_score(one / "checkpoints" / "score.json", 0.1)  # not the user's place for scores
    write_run(root / "grid" / "seed" / "two", [2.5, 2.25], finished=False, lr=2e-3)
    (root / "cut").mkdir()
    (root / "cut" / "recipe.json").write_text('{"digest": "')
    (root / "other").mkdir()
    (root / "other" / "train.json").write_text('{"epochs": 3}')
    (root / "pictures").mkdir()
    (root / ".hidden").mkdir()
    return root


def test_all_runs_below_a_folder_are_listed_and_the_rest_with_a_reason(folder):
    found = {one.name: one for one in find_runs([folder]).summaries}
    assert list(found) == ["cut", "grid/seed/two", "one", "other", "pictures"]
    one, two = found["one"], found["grid/seed/two"]
    assert (one.finished, one.steps, one.loss, one.seconds, one.device) == (True, 3, 1.5, 7.5, "cpu")
    assert one.validation_accuracy == 0.6
    assert one.scores == {"held_out, accuracy": 0.75, "held_out, accuracy (again/score.json)": 0.5}
    assert (two.finished, two.steps, two.loss, two.seconds, two.device) == (False, 2, 2.25, 4.0, "")
    assert two.validation_accuracy is None and not two.scores and not two.reasons
    assert "recipe.json" in found["cut"].reasons[0]
    assert "train.json is damaged, or not of pal train" in found["other"].reasons[0]
    assert "no run of pal train" in found["pictures"].reasons[0]


def test_no_run_is_no_run(tmp_path):
    assert find_runs([tmp_path]).summaries == ()


def test_damage_of_a_run_that_can_be_listed_is_said(folder):
    log = folder / "one" / "log.jsonl"
    first, second, third = log.read_text().splitlines()
    log.write_text(f"{first}\n{second[:9]}\n{third}\n")
    (folder / "one" / "recipe.json").write_text("{")
    (folder / "one" / "provenance.json").write_bytes(b'{"starts": "\xe9"}')
    one = next(one for one in find_runs([folder]).summaries if one.name == "one")
    assert one.finished and one.steps == 1
    assert one.reasons == (
        "log.jsonl is damaged in line 2 of 3; its steps from there on are not shown",
        "recipe.json is damaged; copy it again",
        "provenance.json is damaged; copy it again",
    )
    log.write_text(f"{first}\n{second}\n{third[:9]}")  # as a kill leaves it
    one = next(one for one in find_runs([folder]).summaries if one.name == "one")
    assert one.steps == 2 and not any("log" in reason for reason in one.reasons)


def test_runs_are_compared_at_what_differs(tmp_path):
    a = write_run(tmp_path / "a", [3.0, 2.0], seed=1)
    b = write_run(tmp_path / "b", [3.0, 1.0], seed=1, lr=5e-4)
    write_score(a / "score.json", 0.5)
    write_score(b / "held_out.json", 0.25)
    write_score(b / "score.json", 1.0, "other")
    found = find_runs([a, b])
    assert found.differences() == {"stages.0.lr": {"a": "0.001", "b": "0.0005"}}
    assert found.scores() == {"held_out, accuracy": {"a": 0.5, "b": 0.25}, "other, accuracy": {"b": 1.0}}
    assert [one.loss for one in found.summaries] == [2.0, 1.0]


def test_a_file_of_scores_that_cannot_be_read_is_said_and_the_run_stays(tmp_path):
    a = write_run(tmp_path / "a", [1.0])
    (a / "score.json").write_text("{")
    (a / "notes.json").write_text("[1]")
    (summary,) = find_runs([a]).summaries
    assert summary.loss == 1.0 and not summary.scores
    assert len(summary.reasons) == 1 and "score.json" in summary.reasons[0]


def test_a_run_at_its_start_has_no_numbers(tmp_path):
    a = write_run(tmp_path / "a", [], finished=False)
    (summary,) = find_runs([a]).summaries
    assert (summary.steps, summary.loss, summary.seconds, summary.reasons) == (0, None, None, ())
    with pytest.raises(ConfigError, match="no curve"):
        find_runs([a]).draw(tmp_path / "curves.png")


def test_the_command_lists_compares_and_draws(folder, tmp_path):
    listed = pal_command("runs", folder)
    assert listed.exit_code == 0, listed.output
    rows = {line.split("  ")[0]: line for line in listed.stdout.splitlines()}
    assert list(rows) == ["run", "cut", "grid/seed/two", "one", "other", "pictures"]
    assert "unfinished" in rows["grid/seed/two"] and "finished" in rows["one"] and "0.600" in rows["one"]
    assert sum(line.startswith("note: ") for line in listed.stderr.splitlines()) == 3
    picture = tmp_path / "curves.png"
    compared = pal_command("runs", folder / "one", folder / "grid" / "seed" / "two", "--curves", picture)
    assert "stages.0.lr" in compared.stdout and "0.002" in compared.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(pal_command("runs", folder / "one", folder / "grid" / "seed" / "two", "--json").stdout)
    assert facts["differences"] == {"stages.0.lr": {"one": "0.001", "grid/seed/two": "0.002"}}
    assert [one["steps"] for one in facts["runs"]] == [3, 2]
    assert pal_command("runs", tmp_path / "none").exit_code == 1
    assert pal_command("runs", folder, "--curves", tmp_path / "a.pdf").exit_code == 2
