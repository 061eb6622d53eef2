"""`pal probe mask` and `pal probe depth` from the command line."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pal.app import cli

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(cli.app, ["probe", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("probe", ["mask", "depth"])
def test_from_a_manifest_to_a_folder(probe, shipped, tmp_path):
    out = tmp_path / "out"
    shown = run(probe, "tiny", shipped.scenes, "--limit", 3, "--out", out)
    assert shown.exit_code == 0, shown.output
    found = json.loads((out / "probe.json").read_text())
    assert (found["probe"], found["settings"]["questions"]) == (probe, 3)
    assert found["reading"][0] in " ".join(shown.output.split())


def test_options_of_mask_and_the_same_again(shipped, tmp_path):
    arguments = ("mask", "tiny", shipped.scenes, "--pathway", "keys", "--layers", "0", "--out", tmp_path, "--limit", 2)
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["settings"]["conditions"] == {
        "the keys in layers 0": [{"pathway": "keys", "layers": [0]}],
        "everything": [{}],
    }
    assert {**json.loads(run(*arguments, "--json").stdout), "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize(
    "options, says",
    [
        (("--seconds", "3-1"), "with FROM less than TO"),
        (("--layers", "2-40"), "layer 3 cannot be hidden; the LLM has 0 to 2"),
        (("--encoder", "2"), "stream 2 cannot be hidden"),
        (("--pathway", "values"), "keys or rows"),
    ],
)
def test_faults_are_one_line(options, says, shipped, tmp_path):
    shown = run("mask", "tiny", shipped.scenes, *options, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert says in shown.output
    assert shown.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_of_models_whose_folders_end_alike_stand_apart(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe in ("lal", "pal"):
        shutil.copytree(shipped.bundle, Path(recipe) / "seed-1")
        shown = run("mask", f"{recipe}/seed-1", shipped.scenes, "--pathway", "keys", "--limit", 2)
        assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in Path("runs/probe").iterdir()) == ["mask-lal-seed-1", "mask-pal-seed-1"]
