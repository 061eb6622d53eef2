"""Runs that are killed while they save, and runs that are stopped at any step, end with the weights of a whole one."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pal.model import PalModel
from pal.train import Trainer, run
from pal.train.curves import read_log
from pal.train.recipe import Recipe
from tests.counts import repeats
from tests.processes import PATIENCE, fresh
from tests.train.tiny import HEAR, JOIN, MODEL, READ, recipe

STAGES: list[dict[str, Any]] = [HEAR | {"steps": 6}, READ | {"steps": 4}, JOIN | {"epochs": None, "steps": 6}]
STEPS = 16
INTERVAL = 2


def made(manifest: Path, workers: int = 0) -> Recipe:
    keep = {"checkpoint_every": INTERVAL, "log_every": 1, "workers": workers}
    return recipe(manifest, STAGES, model=MODEL, keep=keep)


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(made(manifest), out)
    return out


def assert_same_run(ours: Path, whole: Path) -> None:
    a, b = (PalModel.from_pretrained(out / "model").state_dict() for out in (ours, whole))
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    losses = [[(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")] for out in (ours, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def newest(out: Path) -> int:
    """Step of the newest complete checkpoint."""
    names = [path.name for path in (out / "checkpoints").glob("step*")]
    return max((int(name[4:].removesuffix(".old")) for name in names), default=0)


def resume(settings: str, out: Path) -> None:
    """What the killed process does."""
    torch.set_num_threads(1)
    run(Recipe.model_validate_json(settings), out, resume=True)


def killed_while_saving(settings: str, out: Path, chosen: random.Random) -> bool:
    """Start or resume the run and kill it a moment after it begins to write a checkpoint.

    Returns:
        False if the run ended before it was killed.
    """
    process = fresh().Process(target=resume, args=(settings, out))
    process.start()
    skips, pause = chosen.randrange(3), chosen.random() * 0.02
    seen: set[str] = set()
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and len(seen) <= skips:
        assert time.monotonic() < deadline
        # names of temporary folders begin with a dot
        seen |= {path.name for path in (out / "checkpoints").glob(".step*")}
        time.sleep(0.0005)
    time.sleep(pause)
    process.kill()
    process.join()
    return process.exitcode != 0


@pytest.mark.torture
def test_kills_while_a_checkpoint_is_written(manifest: Path, whole: Path, tmp_path: Path) -> None:
    """At most one interval is lost by each, and the run that goes on after all of them is the whole one."""
    kills, runs, during = 0, 0, 0
    chosen = random.Random(11)
    settings = made(manifest).model_dump_json()
    out = tmp_path / "run 0"
    while kills < repeats(full=100, reduced=1):
        if killed_while_saving(settings, out, chosen):
            kills += 1
            log = read_log(out / "log.jsonl")
            during += any((out / "checkpoints").glob(".step*"))
            assert not log or log[-1]["step"] - newest(out) <= INTERVAL
        else:
            assert_same_run(out, whole)
            runs += 1
            out = tmp_path / f"run {runs}"
    run(made(manifest), out, resume=True)
    assert_same_run(out, whole)
    print(f"{kills} kills, of which {during} left half a checkpoint")


@pytest.mark.torture
@pytest.mark.parametrize("workers", [0, 2])
def test_stops_at_any_step(manifest: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    """Stop and resume, also at the borders of stages, with loader threads and without."""
    chosen = random.Random(workers)
    borders = [1, 5, 6, 9, 10, STEPS - 2]
    # a stop is agreed on in the step that follows; behind the last one there is nothing to stop
    at = [chosen.choice(borders) if number % 3 == 0 else chosen.randrange(1, STEPS - 1) for number in range(50)]
    for number, stop in enumerate(at[: repeats(full=50, reduced=1)]):
        out = tmp_path / str(number)
        trainer = Trainer(made(manifest, workers), out)
        with pytest.raises(SystemExit):
            for step in trainer.steps():
                if step == stop:
                    trainer.stop()
        again = Trainer(made(manifest, workers), out, resume=True)
        second = chosen.randrange(STEPS)
        for step in again.steps():
            if step == second:
                break  # as a kill between two steps
        run(made(manifest, workers), out, resume=True)
        assert_same_run(out, whole)


def test_a_stop_before_the_last_step_lets_the_run_end(manifest: Path, whole: Path, tmp_path: Path) -> None:
    trainer = Trainer(made(manifest), tmp_path / "run")
    for step in trainer.steps():
        if step == STEPS - 1:
            trainer.stop()
    trainer.finish()
    assert_same_run(tmp_path / "run", whole)
