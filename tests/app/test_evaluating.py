"""`pal eval` into folders and `pal compare`: what they write, print and end with."""

import json

import pytest
from typer.testing import CliRunner

from pal.app import cli
from tests import published

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def mmau(tmp_path):
    return published.mmau(tmp_path / "mmau")


def test_a_benchmark(shipped, mmau, tmp_path):
    out = tmp_path / "run"
    shown = succeed("eval", "tiny", "mmau", "--data", mmau, "--out", out)
    assert f"{out}: accuracy" in shown.stdout
    assert "difficulty: hard (1)" in shown.stdout
    score = json.loads((out / "score.json").read_text())
    assert (score["benchmark"], score["n"], score["rule"]["says"][:8]) == ("mmau", 2, "official")
    assert sorted(path.name for path in out.iterdir()) == ["items.jsonl", "score.json", "settings.json"]
    whole = json.loads(succeed("eval", "tiny", "mmau", "--data", mmau, "--out", out, "--json", "-").stdout)
    settings, items = whole.pop("settings"), whole.pop("items")
    assert whole == score
    assert settings == json.loads((out / "settings.json").read_text())
    assert items == [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    whole = {**whole, "settings": settings, "items": items}
    assert json.loads(succeed("eval", "--rescore", out, "--json", "-").stdout) == whole
    other = json.loads(succeed("eval", "--rescore", out, "--scoring", "exact", "--json", "-").stdout)
    assert other["metric"] == "exact_match"
    back = succeed("eval", "--rescore", out, "--scoring", "official", "--json", "-")
    assert json.loads(back.stdout) == whole


def test_options_of_benchmark_and_rule(shipped, tmp_path):
    root = published.esc50(tmp_path / "esc")
    out = tmp_path / "run"
    arguments = ("esc50", "--data", root, "--out", out, "--scoring", "official", "--folds", "1,2", "--only-audio")
    succeed("eval", "tiny", *arguments, "--set", "rule.label=the sound of {}", "--json", tmp_path / "s.json")
    score = json.loads((tmp_path / "s.json").read_text())
    assert (score["n"], score["no_audio_score"], score["metric"]) == (3, None, "accuracy")
    assert "'the sound of {}'" in score["rule"]["says"]
    assert score["rule"]["embedding"]["name"] == "character n-grams"
    settings = json.loads((out / "settings.json").read_text())
    assert settings["options"] == {"folds": "1,2"}
    refused = run("eval", "tiny", *arguments, "--limit", 1)
    assert (refused.exit_code, "'limit' differs" in refused.stderr) == (1, True)


def test_a_folder_changes_nothing_of_what_is_asked_and_how_it_is_scored(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = published.esc50(tmp_path / "esc")
    for arguments in (("esc50", "--data", root, "--folds", "1"), (shipped.scenes, "--limit", 2)):
        command = ("eval", "tiny", *arguments, "--json", "-")
        found = json.loads(succeed(*command).stdout)
        assert json.loads(succeed(*command, "--out", tmp_path / f"with {len(arguments)}").stdout) == found
    assert (found["metric"], len(found["items"])) == ("exact_match", 2)
    # a published benchmark takes hours: its answers are kept in any case; a manifest's are where they are asked for
    assert [path.name for path in (tmp_path / "runs/eval").iterdir()] == ["esc50-tiny"]


def test_features_are_kept_for_later_runs(shipped, mmau, tmp_path):
    arguments = ("eval", "tiny", "mmau", "--data", mmau, "--cache", tmp_path / "cache", "--out")
    succeed(*arguments, tmp_path / "first")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) == 1 + 2
    succeed(*arguments, tmp_path / "second")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == kept
    first, second = ((tmp_path / run / "items.jsonl").read_bytes() for run in ("first", "second"))
    assert first == second


def test_a_manifest_into_a_folder_and_ranked(shipped, tmp_path):
    out = tmp_path / "run"
    succeed("eval", "tiny", shipped.scenes, "--out", out, "--limit", 3)
    assert json.loads((out / "score.json").read_text())["metric"] == "exact_match"
    ranked = tmp_path / "ranked"
    succeed("eval", "tiny", shipped.scenes, "--out", ranked, "--limit", 3, "--scoring", "rank")
    assert json.loads((ranked / "score.json").read_text())["metric"] == "rank_accuracy"
    refused = run("compare", out, ranked)
    assert (refused.exit_code, "rule differs" in refused.stderr) == (1, True)
    assert "McNemar" in succeed("compare", out, out).stdout
    found = json.loads(succeed("compare", out, out, "--json").stdout)
    assert (found["n"], found["rows"][1]["difference"]) == (3, 0.0)


def test_errors_are_counted_and_end_the_command_with_a_status(shipped, mmau, tmp_path):
    (mmau / "test-mini-audios/4a.wav").write_bytes(b"no audio")
    result = run("eval", "tiny", "mmau", "--data", mmau, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "counts as wrong because of an error: 4a: AudioError" in result.stderr
    assert "1 errors" in result.stdout
    score = json.loads((tmp_path / "run/score.json").read_text())
    assert (score["n"], score["errors"]["count"]) == (2, 1)
    row = {"instruction": "What?", "input": "", "dataset": "d", "task": "t", "output": "dog"}
    lines = [{**row, "audio_id": f"mmau/test-mini-audios/{name}.wav"} for name in ("3fe64f3d", "4a")]
    published.text(tmp_path / "m.jsonl", *map(json.dumps, lines))
    assert run("eval", "tiny", tmp_path / "m.jsonl").exit_code == 1


def test_join(shipped, tmp_path):
    root = published.esc50(tmp_path / "esc")
    for fold in (1, 2):
        out = tmp_path / f"{fold}"
        succeed("eval", "tiny", "esc50", "--data", root, "--out", out, "--folds", fold, "--scoring", "rank")
    both = tmp_path / "both"
    succeed("eval", "--join", tmp_path / "1", "--join", tmp_path / "2", "--out", both)
    assert json.loads((both / "score.json").read_text())["n"] == 3


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("eval", "tiny"), 2, "give a model and a benchmark"),
        (("eval", "tiny", "mmau"), 1, "benchmark 'mmau' needs its folder: --data DIR"),
        (("eval", "tiny", "mmau", "--data", "nowhere"), 1, "no such folder"),
        (("eval", "tiny", "mmau", "--data", ".", "--scoring", "best"), 1, "unknown rule 'best'"),
        (("eval", "tiny", "mmau", "--data", ".", "--set", "x=1"), 1, "unknown key 'x'"),
        (("eval", "--rescore", "nowhere"), 1, "give a run folder of pal eval"),
        (("eval", "tiny", "--rescore", "nowhere"), 2, "takes no model"),
        (("eval", "--join", "nowhere"), 2, "needs a folder to write"),
        (("compare", "nowhere"), 1, "at least two folders"),
        (("compare", "nowhere", "neither"), 1, "nowhere: no such folder or file"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == status
    assert says in result.stderr
