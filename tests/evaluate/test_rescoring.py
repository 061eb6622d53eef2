"""Runs scored again or joined, out of their folders alone."""

import json

import pytest

from pal.errors import BundleError, ConfigError
from pal.evaluate import evaluate, load_result, open_task
from pal.evaluate.rescoring import join, rescore
from tests import published
from tests.evaluate.scripted import Scripted, files


def test_rescore_needs_no_model(model, tmp_path):
    root = published.mmau(tmp_path / "mmau")
    say = Scripted(model, lambda prompt, heard: "(B) a car horn" if "last sound" in prompt else "a man")
    result = evaluate(say, open_task("mmau", root), tmp_path / "run", progress=False)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    assert result.metrics["accuracy"].score == 1.0  # no option has a lone 'b' here
    assert rescore(tmp_path / "run").to_dict() == result.to_dict()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before
    other = rescore(tmp_path / "run", {"name": "exact"})
    assert (other.metric, other.overall.score) == ("exact_match", 0.5)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["rule"] == {"name": "exact"}
    assert settings["model_digest"] == model.digest
    assert rescore(tmp_path / "run", {"name": "official"}).to_dict() == result.to_dict()
    with pytest.raises(BundleError, match="give a run folder of pal eval"):
        rescore(tmp_path / "mmau")


def test_join_makes_folds_one_score(model, tmp_path):
    root = published.esc50(tmp_path / "esc")
    rule = {"name": "exact"}
    for fold, answer in (("1", "dog"), ("2", "door wood knock"), ("3", "dog")):
        say = Scripted(model, lambda prompt, heard, answer=answer: answer)
        evaluate(say, open_task("esc50", root, {"folds": fold}, rule), tmp_path / fold, progress=False)
    result = join([tmp_path / fold for fold in "123"], tmp_path / "all")
    assert result.n == 4
    assert result.overall.score == 0.75
    assert {fold: part.score for fold, part in result.categories["fold"].items()} == {"1": 0.5, "2": 1.0, "3": 1.0}
    assert files(tmp_path / "all") == ["items.jsonl", "score.json", "settings.json"]
    with pytest.raises(ConfigError, match="share questions"):
        join([tmp_path / "1", tmp_path / "1"], tmp_path / "twice")


def test_a_folder_is_read_back_whole_or_not_at_all(model, benchmark, tmp_path):
    folder = tmp_path / "run"
    result = evaluate(model, benchmark, folder, progress=False)
    assert load_result(folder).to_dict() == result.to_dict()
    found = json.loads((folder / "score.json").read_text())
    # as earlier versions wrote it
    before = {"figures": {name: {key: one[key] for key in one if key != "n"} for name, one in found["metrics"].items()}}
    before |= {key: value for key, value in found.items() if key != "metrics"}
    (folder / "score.json").write_text(json.dumps(before))
    assert load_result(folder).to_dict() == result.to_dict()
    alone = load_result(folder / "score.json")
    assert (alone.summary(), alone.settings, alone.items) == (result.summary(), {}, [])
    (folder / "score.json").write_text("{}")
    with pytest.raises(BundleError, match="score it again with pal eval --rescore"):
        load_result(folder)
    (folder / "score.json").unlink()
    with pytest.raises(BundleError, match="incomplete"):
        load_result(folder)
