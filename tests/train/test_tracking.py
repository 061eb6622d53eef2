"""Trackers show what log.jsonl has, after a kill too; one that fails or is missing harms nothing."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.errors import ConfigError
from pal.train import tracking
from pal.train.curves import Log, read_log
from pal.train.recipe import load_recipe
from pal.train.tracking import TrackedRun, Trackers, numbers_of

NAMES: list[Any] = ["tensorboard"]


def line(step: int) -> dict[str, Any]:
    return {"step": step, "stage": "join", "lr": {"llm": step / 8}, "loss": 4.0 / step, "seconds": step / 2}


def write(out: Path, trackers: Trackers | None, done: int, steps: range, *, closed: bool = True) -> None:
    """What a run that is started after `done` steps writes; not closed, it was killed."""
    log = Log(out / "log.jsonl", done, trackers, TrackedRun(out, {"seed": 1}, 1000.0))
    for step in steps:
        log.write(**line(step))
    if closed:
        log.close()


class Recorder:
    """A tracker that keeps what it is given, as a list of each start."""

    def __init__(self) -> None:
        self.starts: list[list[tuple[int, dict[str, float]]]] = []
        self.finished = 0

    def start(self, run: TrackedRun) -> None:
        self.starts.append([])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.starts[-1].append((step, dict(numbers)))

    def finish(self) -> None:
        self.finished += 1


class Failing(Recorder):
    """A tracker that fails at a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == 2:
            raise OSError("the disk is full. And more")
        super().log(step, numbers)


@settings(max_examples=50, deadline=None)
@given(kills=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=4))
def test_each_start_gives_every_step_once(
    tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, int]]
) -> None:
    """Runs that are killed after some steps, and resume at a checkpoint some steps before."""
    out, recorder = tmp_path_factory.mktemp("run"), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracking.TRACKERS, "recorder", lambda: recorder)
        names: Any = ["recorder"]
        done = 0
        for more, lost in kills:
            write(out, Trackers(names), done, range(done + 1, done + more + 1), closed=False)
            done = max(0, done + more - lost)
        write(out, Trackers(names), done, range(done + 1, done + 3))
    logged = read_log(out / "log.jsonl")
    assert [one["step"] for one in logged] == list(range(1, done + 3))
    assert recorder.starts[-1] == [(one["step"], numbers_of(one)) for one in logged]
    assert recorder.finished == 1 and len(recorder.starts) == len(kills) + 1


def test_numbers_of_a_line() -> None:
    given = {"step": 3, "stage": "a", "loss": 1.5, "flag": True, "lr": {"llm": 0.1, "head": 2}, "a": {"b": {"step": 1}}}
    assert numbers_of(given) == {"loss": 1.5, "lr/llm": 0.1, "lr/head": 2, "a/b/step": 1}


def test_tensorboard_has_the_log_s_numbers_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, Trackers(NAMES), 0, range(1, 5), closed=False)
    write(tmp_path, Trackers(NAMES), 2, range(3, 7))  # the checkpoint was after step 2
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    for name in ("loss", "lr/llm", "seconds"):
        points = [(one.step, one.value) for one in shown.Scalars(name)]
        assert points == [(step, pytest.approx(numbers_of(line(step))[name])) for step in range(1, 7)]
    assert [one.wall_time for one in shown.Scalars("loss")] == [1000.0 + step / 2 for step in range(1, 7)]
    assert '"seed": 1' in shown.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Failing(), Recorder()
    monkeypatch.setitem(tracking.TRACKERS, "failing", lambda: failing)
    monkeypatch.setitem(tracking.TRACKERS, "other", lambda: other)
    names: Any = ["failing", "other"]
    with caplog.at_level(logging.WARNING):
        write(tmp_path, Trackers(names), 0, range(1, 5))
    assert [step for step, _ in other.starts[0]] == [1, 2, 3, 4] and other.finished == 1
    assert [step for step, _ in failing.starts[0]] == [1] and not failing.finished
    (warning,) = caplog.messages
    assert "tracker 'failing' failed (OSError: the disk is full)" in warning
    assert [one["step"] for one in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


def test_a_tracker_that_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pal.train import run
    from tests.train.tiny import recipe

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracked = recipe(tmp_path / "none.jsonl", keep={"track": ["tensorboard"]})
    with pytest.raises(ConfigError, match=r"pip install 'pal-audio\[tensorboard\]'"):
        run(tracked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_nobody_knows_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"keep\.track\.0.*'tensorboard' or 'trackio'"):
        load_recipe("recipes/tiny.yaml", ["keep.track=[wandb]"])


# trackio, whose requirements do not fit the versions that the tests pin: a stand-in that writes down its calls

STAND_IN = """
import json, os
from pathlib import Path
from types import SimpleNamespace

CALLS = Path(os.environ["CALLS"])


def note(*call):
    with CALLS.open("a") as file:
        file.write(json.dumps(call) + "\\n")


class Api:
    def runs(self, project):
        names = [call[1]["name"] for call in map(json.loads, CALLS.read_text().splitlines()) if call[0] == "init"]
        if not names:
            raise ValueError("no such project")
        return [SimpleNamespace(name=name, delete=lambda name=name: note("delete", name)) for name in {*names, "other"}]


def init(**given):
    note("init", given, os.environ.get("HF_HUB_OFFLINE"))
    print("* a line that belongs to nobody")


def log(metrics, step):
    if step == int(os.environ.get("FAILS", 0)):
        raise SystemExit(3)
    note("log", step, metrics)


def finish():
    note("finish")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File in which the stand-in for trackio writes what it is called with."""
    folder, found = tmp_path / "stand_in", tmp_path / "calls"
    folder.mkdir()
    (folder / "trackio.py").write_text(STAND_IN)
    found.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CALLS", str(found))
    monkeypatch.setattr(tracking, "version", lambda name: "0.43.0")
    return found


def made(calls: Path) -> list[Any]:
    return [json.loads(text) for text in calls.read_text().splitlines()]


def test_trackio_gets_the_log_and_stays_on_this_machine(calls: Path, tmp_path: Path) -> None:
    names: Any = ["trackio"]
    out = tmp_path / "run"
    out.mkdir()
    name = TrackedRun(out, {}, 0.0).name
    write(out, Trackers(names), 0, range(1, 4))
    write(out, Trackers(names), 1, range(2, 4))
    logs = [["log", step, numbers_of(line(step))] for step in range(1, 4)]
    given = {"project": "pal", "name": name, "config": {"recipe": {"seed": 1}}, "resume": "never", "embed": False}
    begin = ["init", {**given, "auto_log_gpu": False, "auto_log_cpu": False}, "1"]
    assert made(calls) == [begin, *logs, ["finish"], ["delete", name], begin, *logs, ["finish"]]
    assert TrackedRun(tmp_path / "other" / "run", {}, 0.0).name != name


def test_a_trackio_that_ends_does_not_end_the_run(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAILS", "2")
    names: Any = ["trackio"]
    with caplog.at_level(logging.WARNING):
        write(tmp_path, Trackers(names), 0, range(1, 4))
    assert len(caplog.messages) == 1 and "tracker 'trackio' failed" in caplog.messages[0]
    assert [one["step"] for one in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_trackio_that_would_not_do_is_refused(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: Any = ["trackio"]
    Trackers(names)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID is set"):
        Trackers(names)
    monkeypatch.delenv("TRACKIO_SPACE_ID")
    monkeypatch.setattr(tracking, "version", lambda name: "0.9.1")
    with pytest.raises(ConfigError, match=r"trackio 0\.9\.1 is older than 0\.43"):
        Trackers(names)
