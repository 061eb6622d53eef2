"""An evaluation of full size: `make full-evaluation`. Not among the other tests, since it takes minutes.

The shipped model is asked 1,000 questions about 200 scenes, then once more while it is killed at random moments, and
with other batch sizes.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pal.data.synth import synthesise

KILLS = 20


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions about each of 200 scenes; captions, which have no single right wording, are not asked."""
    path = synthesise(tmp_path_factory.mktemp("scenes"), 200, 77, questions_per_scene=8)
    of_scene: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "choices" in record:
            of_scene.setdefault(record["audio_id"], []).append(line)
    path.write_text("".join(f"{line}\n" for lines in of_scene.values() for line in lines[:5]))
    return path


def start(manifest: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pal", "eval", "tiny", str(manifest), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing stops, and its seconds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started = time.perf_counter()
    assert start(manifest, out).wait() == 0
    return out, time.perf_counter() - started


def same(one: Path, other: Path) -> None:
    for name in ("items.jsonl", "score.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_thousand_questions(whole: tuple[Path, float]) -> None:
    out, seconds = whole
    assert len((out / "items.jsonl").read_text().splitlines()) == 1000
    print(f"\n1,000 questions about 200 scenes: {seconds:.0f} s")


def test_killed_at_random_moments(manifest: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    chance = random.Random(0)
    for kill in range(KILLS):
        process = start(manifest, tmp_path / "run", "--batch", str(chance.choice((7, 32, 64))))
        journal = tmp_path / "run/answers.0.jsonl"
        # each gets a little further than the one before: else all would be killed while they load
        while not journal.is_file() or len(journal.read_bytes().splitlines()) < 45 * kill:
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run/score.json").exists()
    assert start(manifest, tmp_path / "run").wait() == 0
    same(tmp_path / "run", whole[0])


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_change_nothing(batch: int, manifest: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    assert start(manifest, tmp_path / "run", "--batch", str(batch)).wait() == 0
    same(tmp_path / "run", whole[0])
