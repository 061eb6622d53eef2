"""`pal ablate`: what it prints and ends with; the grid itself is tests/probe/test_ablate.py's."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from pal.app import cli
from tests.app.conftest import ENCODER, LLM, STAGE


@pytest.fixture
def recipe(scenes, tmp_path):
    fields = {
        "model": {"llm": {"fresh": LLM, "vocabulary": 280}, "encoders": [ENCODER], "integration": "lal"},
        "data": {"scenes": {"manifest": str(scenes)}},
        "stages": [STAGE],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "small.yaml"


def run(*arguments):
    return CliRunner().invoke(cli.app, ["ablate", *map(str, arguments)])


def test_the_command(recipe, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ("--axis", "ffn=frozen", "--seeds", 1, "--on", scenes, "--limit", 4, "--set", "stages.0.steps=1")
    shown = run(recipe, *first)
    assert shown.exit_code == 0, shown.output
    assert "runs/ablate-small: probe.json, 3 pictures" in shown.stdout
    assert "- There is one seed" in shown.stdout
    assert (tmp_path / "runs/ablate-small/ffn-frozen/seed-1/train.json").is_file()
    found = json.loads(run(recipe, *first, "--json").stdout)
    assert found == {**json.loads((tmp_path / "runs/ablate-small/probe.json").read_text()), "seconds": found["seconds"]}
    assert found["settings"]["set"] == ["stages.0.steps=1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--axis", "colour"], "error: unknown axis 'colour'; known: integration"),
        (["--axis", "depth=deep"], "error: axis 'depth': unknown value 'deep'"),
        (["--axis", "depth", "--set", "model.integration=plits"], "error: integration 'plits' has no option 'layers'"),
        (["--axis", "ffn", "--on", "none.jsonl"], "error: none.jsonl: no such manifest"),
    ],
)
def test_errors_are_one_line(recipe, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = run(recipe, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(says) and result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
