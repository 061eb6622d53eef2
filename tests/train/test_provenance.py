"""What a run was started with is written before its first step, and again where it is resumed."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import pal
import pal.pretrained
from pal.digest import digest
from pal.files import sha256
from pal.train import Trainer, provenance, run
from pal.train.recipe import Recipe
from pal.train.step import Update
from tests.train.tiny import JOIN, failing_after, recipe

STAGES = [{**JOIN, "epochs": None, "steps": 3}]


def test_a_run_that_was_stopped_and_resumed_says_with_what(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    wanted = recipe(manifest, STAGES, keep={"checkpoint_every": 1, "log_every": 1, "track": ["tensorboard"]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(2))
        run(wanted, out)
    (start,) = provenance.read(out)
    assert start["step"] == 0 and start["device"] == "cpu" and start["processes"] == 1
    assert Recipe.model_validate(start["recipe"]) == wanted and start["recipe_digest"] == wanted.digest
    assert start["data"] == {"scenes": sha256(manifest)}
    assert start["versions"]["pal"] == pal.__version__
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["transformers"] == transformers.__version__
    trainer = Trainer(wanted, tmp_path / "same")  # its weights are drawn by the same seed
    fresh = {name: digest(part.state_dict()) for name, part in trainer.model.parts().items()}
    assert start["models"] == {"sources": [], "weights": fresh}

    run(wanted, out, resume=True)
    again = provenance.read(out)
    assert [one["step"] for one in again] == [0, 2] and again[0] == start and "models" not in again[1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    assert [(one.step, one.value) for one in shown.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    assert shown.Scalars("loss")[0].wall_time == pytest.approx(start["time"] + lines[0]["seconds"])

    run(wanted.model_copy(update={"keep": wanted.keep.model_copy(update={"track": []})}), out, overwrite=True)
    assert [one["step"] for one in provenance.read(out)] == [0] and not (out / "tensorboard").exists()


def test_sources_of_weights_have_digests(tmp_path: Path) -> None:
    data = {"a": {"manifest": "a.jsonl"}}
    stage = {"train": {"projectors": True}, "lr": 1e-3, "steps": 1, "batch": {"rows": 1}}
    model = {"llm": "smollm2-135m-instruct", "encoders": ["whisper-tiny.en", {"name": "whisper", "path": "me/w"}]}
    llm, first, second = provenance.sources(Recipe(model=model, data=data, stages=[stage]))
    assert llm["part"] == "llm" and llm["file_sha256"] == pal.pretrained.SMOLLM2.sha256
    assert first["part"] == "encoder 0" and first["package"] == pal.pretrained.WHISPER.package
    assert second == {"part": "encoder 1", "source": "me/w", "revision": None}
    (given,) = provenance.sources(Recipe(bundle=pal.SHIPPED, data=data, stages=[stage]))
    assert given["manifest_sha256"] == sha256(pal.SHIPPED / "manifest.json")


def test_a_checkout_has_a_revision_and_an_installed_package_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    found = provenance.revision()
    if (root / ".git").exists():
        assert found is not None and len(found["commit"]) == 40 and isinstance(found["changed"], bool)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "pal" / "train" / "provenance.py"))
    provenance.revision.cache_clear()
    assert provenance.revision() is None
    provenance.revision.cache_clear()


def test_a_file_of_another_kind_is_no_start(tmp_path: Path) -> None:
    for text in ("", "[]", '{"starts": [{"time": "now"}]}'):
        (tmp_path / provenance.FILE).write_text(text)
        assert provenance.read(tmp_path) == []
