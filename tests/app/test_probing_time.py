"""`pal probe time` and `pal probe layers` as commands."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pal.app import cli
from pal.probe import sweeps, time

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(cli.app, ["probe", *(str(argument) for argument in arguments)])


def test_time(shipped, tmp_path, monkeypatch):
    few = {name: replace(sweep, points=sweep.points[-2:]) for name, sweep in sweeps.SWEEPS.items()}
    for module in (sweeps, time):
        monkeypatch.setattr(module, "SWEEPS", few)
    monkeypatch.setattr("pal.probe.threshold.RESAMPLES", 50)
    out = tmp_path / "found"
    result = run("time", "tiny", "--pairs", 2, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "probe.json").read_text())
    assert [picture["file"] for picture in found["pictures"]] == ["gap.png", "length.png", "half.png", "third.png"]
    assert all((out / picture["file"]).stat().st_size > 5000 for picture in found["pictures"])
    assert found["settings"]["pairs"] == 2
    assert f"{out}: probe.json, 4 pictures" in result.stdout


def test_layers(shipped, tmp_path):
    out = tmp_path / "found"
    result = run("layers", "tiny", "--clips", 24, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads((out / "probe.json").read_text())
    assert json.loads(result.stdout) == found
    table = found["tables"]["synth: macro average precision"]
    chance = found["details"]["synth"]["chance"]
    assert {row["rows"] for row in table} == {"last", "after", "before", "no audio", "encoder", "connector"}
    controls = [row["score"] for row in table if row["rows"] in ("before", "no audio")]
    assert len(controls) == 2 * 4
    assert controls == pytest.approx([chance] * len(controls))
    assert {path.name for path in out.iterdir()} == {"probe.json", "layers.png", "labels.png"}


def test_a_model_that_is_given_twice():
    result = run("time", "tiny", "tiny")
    assert (result.exit_code, result.stderr) == (1, "error: a model is given twice; give each model once\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("time", "nowhere"), "nowhere"),
        (("layers", "tiny", "nowhere.jsonl"), "no such manifest"),
        (("layers", "tiny", "--clips", 1), "give more clips"),
    ],
)
def test_wrong_use(shipped, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert says in result.stderr
