"""However a run is stopped, going on with it gives bitwise the weights of a run that was not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pal.errors import ConfigError
from pal.model import PalModel
from pal.train import Trainer, curves, run
from pal.train.curves import read_log
from pal.train.step import Update
from tests.processes import PATIENCE, fresh
from tests.train.tiny import failing_after, recipe, run_elsewhere

STEPS = 3 + 3 + 5
DRAW = curves.draw
"""Itself, before a fixture replaces it."""


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pal.train.curves.draw", DRAW)
        run(recipe(manifest), out)
    return out


def assert_same_run(ours: Path, whole: Path) -> None:
    a, b = (PalModel.from_pretrained(out / "model").state_dict() for out in (ours, whole))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    losses = [[(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")] for out in (ours, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.mark.parametrize("at", [1, 3, 7])
def test_exception(manifest: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """In the middle of a step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(at))
        run(recipe(manifest), tmp_path)
    run(recipe(manifest), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_the_log_of_the_whole_run(whole: Path) -> None:
    report = json.loads((whole / "train.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in report["stages"]] == [("hear", 3), ("read", 3), ("join", 5)]
    assert all(stage["median_step_seconds"] > 0 for stage in report["stages"])
    peaks = [stage["peak_memory_bytes"] for stage in report["stages"]]
    assert 1e8 < peaks[0] <= peaks[1] <= peaks[2] < 1e12
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(
    manifest: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        for step in Trainer(recipe(manifest), tmp_path).steps():
            if step == 6:
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert left.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "step0000007").is_dir()
    run(recipe(manifest), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_caller_steps_stops_and_goes_on(manifest: Path, whole: Path, tmp_path: Path) -> None:
    """Leaving the loop is like a kill; `stop` ends with a checkpoint; `fit` goes on from it."""
    before = signal.getsignal(signal.SIGINT)
    first = Trainer(recipe(manifest), tmp_path)
    for step in first.steps():
        assert step == first.state.step
        if step == 5:  # the last checkpoint is that of step 4
            break
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "train.json").exists()
    second = Trainer(recipe(manifest), tmp_path, resume=True)
    steps = second.steps()
    assert next(steps) == 5
    second.stop()
    with pytest.raises(SystemExit):
        list(steps)
    assert (tmp_path / "checkpoints" / "step0000006").is_dir()
    third = Trainer(recipe(manifest), tmp_path, resume=True)
    assert third.fit() is third.model
    assert_same_run(tmp_path, whole)
    fourth = Trainer(recipe(manifest), tmp_path, resume=True)
    assert fourth.finished and list(fourth.steps()) == [] and fourth.fit() is fourth.model


def test_a_run_killed_before_its_bundle_was_written_has_the_trained_weights(
    manifest: Path, whole: Path, tmp_path: Path
) -> None:
    for _ in Trainer(recipe(manifest), tmp_path).steps():
        pass
    run(recipe(manifest), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_kill(manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = fresh().Process(target=run_elsewhere, args=(recipe(manifest).model_dump_json(), out, {}))
    process.start()
    deadline = time.monotonic() + PATIENCE
    while len(read_log(out / "log.jsonl")) < 6:
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (out / "train.json").exists()
    run(recipe(manifest), out, resume=True)
    assert_same_run(out, whole)


def test_a_finished_run_is_left_alone(manifest: Path, whole: Path) -> None:
    before = (whole / "train.json").stat().st_mtime_ns
    model = run(recipe(manifest), whole, resume=True)
    assert model.state_dict().keys() == PalModel.from_pretrained(whole / "model").state_dict().keys()
    assert (whole / "train.json").stat().st_mtime_ns == before


def test_workers_and_prefetch_change_nothing(manifest: Path, whole: Path, tmp_path: Path) -> None:
    run(recipe(manifest, keep={"checkpoint_every": 100, "log_every": 1, "workers": 3, "prefetch": 5}), tmp_path)
    assert_same_run(tmp_path, whole)


def test_data_that_came_since_are_refused(manifest: Path, tmp_path: Path) -> None:
    """An optional source that was missing: the batches of the steps to come would be others."""
    late = tmp_path / "late.jsonl"
    data = {"scenes": {"manifest": str(manifest)}, "late": {"manifest": str(late), "optional": True}}
    next(iter(Trainer(recipe(manifest, data=data), tmp_path / "run").steps()))
    trainer = Trainer(recipe(manifest, data=data), tmp_path / "run", resume=True)
    trainer.stop()
    with pytest.raises(SystemExit):
        list(trainer.steps())
    shutil.copy(manifest, late)
    with pytest.raises(ConfigError, match="data 'late' was missing when the run was started"):
        list(Trainer(recipe(manifest, data=data), tmp_path / "run", resume=True).steps())
