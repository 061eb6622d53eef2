"""A grid of four tiny runs: everything is written, nothing is done twice, and a kill changes nothing."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml

from pal.data.synth import synthesise
from pal.errors import ConfigError, ManifestError
from pal.evaluate import Result, evaluate
from pal.model import PalModel
from pal.probe import ablate as probe
from pal.probe.ablate import ablate
from pal.train.recipe import load_recipe
from pal.train.seeding import seed_everything
from pal.train.setup import build_model
from pal.train.sources import open_sources
from pal.train.step import Update
from tests.probe.test_axes import RECIPE

AXES = ["ffn"]


@pytest.fixture(scope="module", autouse=True)
def some_are_right():
    """Models of two steps know nothing: a coin that the answer tosses says what is right, so that numbers differ.

    And their answers would never end.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "evaluate", lambda m, asked, **o: evaluate(m, replace(asked, max_new_tokens=3), **o))
        patch.setattr(
            "pal.evaluate.rules.exact.exact_match", lambda text, wanted: crc32(f"{text}|{wanted}".encode()) % 3 > 0
        )
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    fields = json.loads(json.dumps(RECIPE))
    del fields["model"]["llm"]["fresh"]["vocab_size"]
    fields["model"]["llm"]["vocabulary"] = 280
    fields["model"]["integration"] = "lal"
    fields["data"]["scenes"]["synth"] = {"scenes": 4, "seed": 1, "seconds": 1.5, "questions_per_scene": 3}
    part = {"connector": True, "projectors": True, "llm": "full"}
    fields["stages"] = [{"train": part, "lr": 1e-2, "steps": 2, "batch": {"clips": 2, "rows_per_clip": 2}}]
    fields["keep"] = {"log_every": 1, "checkpoint_every": 1}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    return [synthesise(folder / name, 3, seed, 1.5, 2, workers=1) for name, seed in (("one", 7), ("two", 8))]


@pytest.fixture(scope="module")
def done(recipe, questions, tmp_path_factory):
    """The grid of two cells and two seeds, and its folder."""
    out = tmp_path_factory.mktemp("ablate") / "out"
    result = ablate(recipe, AXES, out, seeds=2, on=questions)
    result.save(out)
    return result, out


@pytest.fixture
def counted(monkeypatch):
    """How often something was trained, asked and counted."""
    calls = {"run": 0, "evaluate": 0, "counts": 0}

    def watch(owner, name):
        before = getattr(owner, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(probe.train, "run")
    watch(probe, "evaluate")
    watch(probe, "counts")
    return calls


def answers(out, cell, seed, name):
    return Result.load(out / cell / f"seed-{seed}" / "on" / f"{name}.json")


def test_everything_is_written(done):
    _, out = done
    assert sorted(path.name for path in out.iterdir()) == [
        "cost.png",
        "data",
        "ffn-frozen",
        "ffn-trained",
        "loss.png",
        "probe.json",
        "score.png",
        "table.md",
    ]
    for cell in ("ffn-trained", "ffn-frozen"):
        assert (out / cell / "cost.json").is_file()
        for seed in (1, 2):
            run = out / cell / f"seed-{seed}"
            assert (run / "data").readlink() == Path("../../data")
            assert json.loads((run / "train.json").read_text())["recipe"]["seed"] == seed
            assert answers(out, cell, seed, "one").items[0].no_audio_correct is not None
    saved = json.loads((out / "probe.json").read_text())
    assert (saved["probe"], saved["model"]["cells"]) == ("ablate", ["ffn trained", "ffn frozen"])
    assert set(saved["settings"]["asked"]) == {"one", "two"}
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| cell | one (") and lines[2].startswith("| ffn trained | ")
    assert "| ffn frozen | one | " in (out / "table.md").read_text()


def test_numbers_are_those_of_the_answers(done):
    result, out = done
    right = {
        cell: np.array([[item.correct for item in answers(out, cell, seed, "two").items] for seed in (1, 2)])
        for cell in ("ffn-trained", "ffn-frozen")
    }
    n = right["ffn-trained"].shape[1]
    rows = result.tables[f"two, {n} questions"]
    assert [row["score"] for row in rows] == pytest.approx([right[cell].mean() for cell in right])
    assert [row["lowest_seed"] for row in rows] == pytest.approx([right[cell].mean(1).min() for cell in right])
    assert rows[0]["minus_first"] is None
    assert rows[1]["minus_first"] == pytest.approx(right["ffn-frozen"].mean() - right["ffn-trained"].mean())
    # each question is in one domain and one task
    parts = result.tables["two by domain and task"]
    for kind in ("domain", "task"):
        of_kind = [row for row in parts if row["questions_about"].startswith(kind)]
        if of_kind:  # a kind that all questions share is left out
            assert sum(row["n"] for row in of_kind) == n
            mean = sum(row["n"] * row["ffn frozen"] for row in of_kind) / n
            assert mean == pytest.approx(right["ffn-frozen"].mean())
    assert any(row["questions_about"].startswith("task") for row in parts)


def test_costs_of_the_cells(done):
    result, out = done
    trained, frozen = result.tables["Cost of a training step"]
    llm = PalModel.from_pretrained(out / "ffn-trained/seed-1/model").llm
    ffn = sum(p.numel() for name, p in llm.named_parameters() if "mlp" in name.split("."))
    assert trained["trained_parameters"] - frozen["trained_parameters"] == ffn > 0
    # the weights' gradients of three linear layers are a third of what these cost, and are left out
    assert 0 < frozen["gigaflops"] < trained["gigaflops"]
    assert frozen["saved_megabytes"] <= trained["saved_megabytes"]
    steps = [
        json.loads((out / "ffn-frozen" / f"seed-{seed}" / "train.json").read_text())["stages"][-1][
            "median_step_seconds"
        ]
        for seed in (1, 2)
    ]
    assert frozen["seconds"] == statistics.median(steps)


def test_frozen_ffn_stays_what_it_was_and_the_rest_is_trained(done, recipe):
    _, out = done
    run = out / "ffn-frozen" / "seed-2"
    made = load_recipe(recipe, ["seed=2"])
    seed_everything(2, "model")
    before = build_model(made, open_sources(made, run / "data"), run).state_dict()
    after = PalModel.from_pretrained(run / "model").state_dict()
    kept = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    ffn = {name for name in after if "mlp" in name.split(".")}
    encoder = {name for name in after if "encoders" in name.split(".")}
    assert ffn and ffn <= kept
    assert kept <= ffn | encoder | {name for name in after if not after[name].is_floating_point()}
    other = PalModel.from_pretrained(out / "ffn-trained/seed-2/model").state_dict()
    assert not any(torch.equal(other[name], before[name]) for name in ffn)


def test_a_second_call_does_nothing(done, recipe, questions, counted):
    result, out = done
    again = ablate(recipe, AXES, out, seeds=2, on=questions)
    assert counted == {"run": 0, "evaluate": 0, "counts": 0}
    assert again.tables == result.tables and again.reading == result.reading
    assert again.details == result.details
    assert again.settings == result.settings


def test_what_changed_is_asked_again_and_not_trained(done, recipe, questions, counted, monkeypatch):
    _, out = done
    monkeypatch.setattr(Update, "__call__", None)
    before = (out / "ffn-trained/seed-1/on/one.json").read_bytes()
    fewer = ablate(recipe, ["ffn=trained"], out, seeds=1, on=questions, limit=2)
    assert counted == {"run": 1, "evaluate": 2, "counts": 0}
    assert len(answers(out, "ffn-trained", 1, "one").items) == 2
    assert "There is one seed" in fewer.reading[0]
    ablate(recipe, ["ffn=trained"], out, seeds=1, on=questions)
    assert counted["evaluate"] == 4
    again = json.loads((out / "ffn-trained/seed-1/on/one.json").read_bytes())
    first = json.loads(before)
    del first["settings"]["model"], again["settings"]["model"]  # trained just now, or read from its bundle
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_an_answer_that_raised_is_counted_and_asked_again(done, recipe, questions, counted, tmp_path):
    _, out = done
    lines = questions[0].read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    record = {**json.loads(lines[0]), "audio_id": str(tmp_path / "none.wav")}
    fine = {**json.loads(lines[1]), "audio_id": str(questions[0].parent / json.loads(lines[1])["audio_id"])}
    broken.write_text(json.dumps(record) + "\n" + json.dumps(fine) + "\n")
    for _ in range(2):
        result = ablate(recipe, ["ffn=trained"], out, seeds=1, on=[broken])
        assert result.details["errors"] == 1
        assert any("1 answers raised" in line for line in result.reading)
    assert counted["evaluate"] == 2


def test_killed_and_gone_on_with(done, recipe, questions, counted, monkeypatch, tmp_path):
    _, whole = done
    result = ablate(recipe, AXES, whole, seeds=1, on=questions)  # all of it is there
    assert counted == {"run": 0, "evaluate": 0, "counts": 0}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        update, left = Update.__call__, iter(range(3))  # up to the middle of the second run

        def dies(self, *args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return update(self, *args)

        patch.setattr(Update, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            ablate(recipe, AXES, out, seeds=1, on=questions)
    assert counted == {"run": 2, "evaluate": 2, "counts": 1}
    with monkeypatch.context() as patch:
        save = Result.save

        def fails(self, path):
            if self.benchmark == "two":
                raise KeyboardInterrupt
            save(self, path)

        patch.setattr(Result, "save", fails)
        with pytest.raises(KeyboardInterrupt):
            ablate(recipe, AXES, out, seeds=1, on=questions)
    # the second run is taken up again; its second answers are made and lost
    assert counted == {"run": 3, "evaluate": 4, "counts": 1}
    assert not (out / "table.md").exists()
    again = ablate(recipe, AXES, out, seeds=1, on=questions)
    assert counted == {"run": 4, "evaluate": 5, "counts": 2}
    scores = [title for title in result.tables if title != "Cost of a training step"]
    assert [again.tables[title] for title in scores] == [result.tables[title] for title in scores]
    for run in result.settings["runs"]:
        one, other = (PalModel.from_pretrained(folder / run / "model").state_dict() for folder in (whole, out))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_nothing_is_begun_where_a_cell_does_not_fit(recipe, questions, counted, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="every 4 exceeds the LLM's 3 layers"):
        ablate(recipe, ["integration=[lal, flamingo]"], out, on=questions)
    with pytest.raises(ManifestError, match="no such manifest"):
        ablate(recipe, ["ffn"], out, on=[tmp_path / "none.jsonl"])
    with pytest.raises(ConfigError, match="two manifests are named 'one'"):
        ablate(recipe, ["ffn"], out, on=[questions[0], questions[0]])
    assert counted == {"run": 0, "evaluate": 0, "counts": 0}
    assert not out.exists()


def test_runs_of_another_recipe_or_other_data_are_refused(done, recipe, questions, counted):
    _, out = done
    with pytest.raises(ConfigError, match=r"another recipe; it differs in: stages\.0\.steps"):
        ablate(recipe, AXES, out, ["stages.0.steps=3"], on=questions)
    with pytest.raises(ConfigError, match="was trained on other data"):
        ablate(recipe, ["queries=with"], out, ["data.scenes.synth.seed=9"], on=questions)
    assert counted["run"] == 0


def test_scenes_without_a_manifest(done, recipe, counted):
    _, out = done
    first = ablate(recipe, ["ffn=trained"], out, seeds=1, limit=8)
    assert (out / "scenes-2" / "manifest.jsonl").is_file()
    assert ablate(recipe, ["ffn=trained"], out, seeds=1, limit=8).tables == first.tables
    assert counted["evaluate"] == 1
