"""Loader processes give the batches of no processes at all, also when they are killed on the way."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from pydantic import ValidationError

from pal.data.collate import WaveformCache
from pal.data.manifest import Manifest, Record, Turn, write_manifest
from pal.data.sharding import shard
from pal.errors import AudioWarning, ManifestError
from pal.train import run, trainer
from pal.train.loader_process import LoaderError, LoaderProcesses
from pal.train.objectives import MicroBatch, build_objective
from pal.train.prefetching import PrefetchLoader
from pal.train.sampler import Group
from pal.train.sources import StageData
from pal.types import Frames
from tests.counts import full_only, repeats
from tests.models import tiny_model
from tests.processes import fresh
from tests.train.tiny import JOIN, recipe

SPEED = {"speed": [0.9, 1.1], "gain_db": [-6, 6]}
STAGE = {"train": {"projectors": True}, "lr": 1e-3, "batch": {"seconds": 6, "rows_per_clip": 2, "bucket": 2}}


def data_of(manifest: Path, steps: int, **source: Any) -> StageData:
    source = {"manifest": str(manifest), "augment": SPEED} | source
    made = recipe(manifest, [STAGE | {"steps": steps}], data={"scenes": source})
    model = tiny_model("pal", warm=False)
    data = StageData(made, 0, {"scenes": Manifest(manifest)})
    data.start(model, build_objective(model, made.stages[0], ()).train(), WaveformCache(1 << 24))
    return data


def content(micro_batches: list[MicroBatch]) -> list[Any]:
    """All of some micro-batches, as values that can be compared."""
    found: list[Any] = []
    for one in micro_batches:
        rows = [(row.ids, row.clips, row.labels) for row in one.batch.conversations]
        assert one.batch.prepared is not None
        frames = [x for part in one.batch.prepared.parts if isinstance(part, Frames) for x in part.blocks_WFM]
        sounds = [(tuple(x.shape), x.numpy().tobytes()) for x in [*one.batch.waveforms, *frames]]
        found.append((rows, sounds, one.batch.records, one.batch.tags, one.datasets, one.seed, one.counts))
    return found


def loaded(data: StageData, *where: Any) -> list[Any]:
    with closing(PrefetchLoader(data, *where)) as loader:
        return [content(micro_batches) for micro_batches in loader]


@pytest.mark.torture
@pytest.mark.parametrize("parts", [pytest.param(1, marks=full_only), 2, pytest.param(4, marks=full_only)])
def test_batches_are_those_of_no_loaders(manifest: Path, parts: int) -> None:
    data = data_of(manifest, 4)
    records = []
    for part in range(parts):
        expected = loaded(data, 0, part, parts, 0, 1)
        assert loaded(data, 0, part, parts, 2, 3, False) == expected
        assert loaded(data, 0, part, parts, 2, 3, True) == expected
        records += [
            (step, record) for step, ones in enumerate(expected) for one in ones if one[-1] for record in one[2]
        ]
    whole = loaded(data, 0, 0, 1, 0, 1)
    assert sorted(records) == sorted(
        (step, record) for step, ones in enumerate(whole) for one in ones for record in one[2]
    )


@pytest.mark.torture
def test_killed_processes_lose_and_repeat_nothing(manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    kills = repeats(full=100, reduced=1)
    data = data_of(manifest, 3 * kills + 4)
    expected = loaded(data, 0, 0, 1, 0, 1)
    chance = random.Random(4)
    at = {3 * kill + chance.randrange(3) for kill in range(kills)}
    found, killed = [], set()
    with closing(PrefetchLoader(data, 0, 0, 1, 2, 2, True)) as loader:
        assert loader.processes is not None
        for step, micro_batches in enumerate(loader):
            found.append(content(micro_batches))
            if step in at:
                time.sleep(chance.uniform(0, 0.02))
                pids = sorted(set(loader.processes.pids) - killed)  # one that is idle is not missed yet
                for pid in chance.sample(pids, min(len(pids), 1)):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
    assert found == expected and len(killed) >= 0.9 * kills
    assert sum("ended by signal 9" in line.message for line in caplog.records) == len(killed)


def test_a_run_goes_on_when_a_process_is_killed(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(manifest, [JOIN | {"epochs": 3}])
    plain = run(made, tmp_path / "plain")
    loaders = []
    start = PrefetchLoader.__init__

    def noting(self: PrefetchLoader, *args: Any) -> None:
        start(self, *args)
        loaders.append(self)

    monkeypatch.setattr(PrefetchLoader, "__init__", noting)
    killed = []

    def kill(inputs: Any, *_: Any) -> Any:
        (loader,) = loaders
        assert loader.processes is not None
        if not killed:
            killed.append(loader.processes.pids[0])
            os.kill(killed[0], signal.SIGKILL)
        return seen(inputs, *_)

    seen = trainer.step_inputs
    monkeypatch.setattr(trainer, "step_inputs", kill)
    keep = {"loader": "processes", "workers": 1, "log_every": 1}
    with_processes = run(made.model_copy(update={"keep": type(made.keep)(**keep)}), tmp_path / "processes")
    assert killed
    for (name, ours), theirs in zip(with_processes.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_shards_give_the_batches_of_the_folder(manifest: Path, tmp_path: Path) -> None:
    done = shard(manifest, tmp_path / "shards", 100_000)
    assert done.shards > 1
    folder, shards = (loaded(data_of(path, 3), 0, 0, 1, 0, 1) for path in (manifest, Path(done.manifest)))
    assert folder == shards


class Crash:
    """In place of a `GroupLoader`: ends its process."""

    waveforms = WaveformCache(100)

    def __call__(self, groups: Any, counts: bool) -> MicroBatch:
        os._exit(3)


@full_only
@pytest.mark.torture
def test_a_process_that_always_ends_ends_the_run() -> None:
    fault = r"ended 5 times at step 7, the last time with status 3"
    with closing(LoaderProcesses(Crash(), 1)) as processes, pytest.raises(LoaderError, match=fault):
        processes(7, [([Group(0, (0,), 0)], True)])


def alive(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        yield pid


def test_no_process_outlives_its_loader(manifest: Path) -> None:
    with closing(PrefetchLoader(data_of(manifest, 9), 0, 0, 1, 2, 2, True)) as loader:
        assert loader.processes is not None
        steps = iter(loader)
        next(steps)
        pids = loader.processes.pids
        assert list(alive(pids))
    assert not list(alive(pids)) and not loader.processes.pids


def abandoned(manifest: Path, told: Any) -> None:
    loader = PrefetchLoader(data_of(manifest, 9), 0, 0, 1, 2, 2, True)
    steps = iter(loader)
    next(steps)
    assert loader.processes is not None
    told.send(loader.processes.pids)
    time.sleep(600)


@full_only
@pytest.mark.torture
def test_no_process_outlives_a_killed_training_process(manifest: Path) -> None:
    ours, theirs = fresh().Pipe()
    process = fresh().Process(target=abandoned, args=(manifest, theirs))
    process.start()
    pids = ours.recv()
    process.kill()
    process.join()
    for _ in range(600):
        if not list(alive(pids)):
            break
        time.sleep(0.1)
    assert pids and not list(alive(pids))


def of_three_clips(tmp_path: Path) -> StageData:
    """Steps of a clip each, one of which is cut off; the clips' records are in `m.jsonl`."""
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", [0.1] * 1600, 16_000)
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:-100])
    records = [Record(name, (str(tmp_path / f"{name}.wav"),), (Turn("?", "!"),), "t", "d") for name in "abc"]
    write_manifest(tmp_path / "m.jsonl", records)
    made = recipe(
        tmp_path / "m.jsonl",
        [{**STAGE, "batch": {"rows": 1}, "steps": 3}],
        data={"x": {"manifest": str(tmp_path / "m.jsonl")}},
    )
    model = tiny_model("pal", warm=False)
    data = StageData(made, 0, {"x": Manifest(tmp_path / "m.jsonl")})
    data.start(model, build_objective(model, made.stages[0], ()), WaveformCache(0))
    return data


def test_bad_clips_of_processes_are_listed_as_those_of_threads(tmp_path: Path) -> None:
    data = of_three_clips(tmp_path)
    found = []
    for processes in (False, True):
        with closing(PrefetchLoader(data, 0, 0, 1, 1, 3, processes)) as loader:
            found.append([(one.batch.records, one.counts, one.left_out) for (one,) in loader])
    threads, others = found
    assert others == threads
    ((bad,),) = [left_out for _, _, left_out in threads if left_out]
    assert bad.clip == str(tmp_path / "b.wav") and bad.records == ("b",) and "b.wav" in bad.reason
    assert [counts for _, counts, _ in threads].count(False) == 1


def test_errors_arrive_at_their_step_with_their_message(tmp_path: Path) -> None:
    data = of_three_clips(tmp_path)
    faulty = (
        (tmp_path / "m.jsonl")
        .read_text()
        .replace('"output": "!", "dataset": "d", "task": "t"}\n', '"outputs": "!"}\n', 1)
    )
    (tmp_path / "m.jsonl").write_text(faulty)
    data.manifests[:] = [Manifest(tmp_path / "m.jsonl")]
    data.loader.manifests = data.manifests
    found = {}
    for processes in (False, True):
        steps = 0
        with closing(PrefetchLoader(data, 0, 0, 1, 1, 3, processes)) as loader, pytest.raises(ManifestError) as caught:
            for _ in loader:
                steps += 1
        found[processes] = (steps, str(caught.value))
    assert found[True] == found[False] and "line 1: unknown key 'outputs'" in found[True][1]


def test_warnings_of_processes_are_given_here(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [0.1] * 1600, 16_000)
    sound = bytearray((tmp_path / "a.wav").read_bytes())
    sound[4:8] = sound[40:44] = b"\xff\xff\xff\xff"  # as a program writes that streams
    (tmp_path / "a.wav").write_bytes(sound)
    write_manifest(tmp_path / "m.jsonl", [Record("a", (str(tmp_path / "a.wav"),), (Turn("?", "!"),), "t", "d")])
    data = data_of(tmp_path / "m.jsonl", 1, augment=None, read_to_end=True)
    with closing(PrefetchLoader(data, 0, 0, 1, 1, 1, True)) as loader, pytest.warns(AudioWarning, match=r"a\.wav"):
        assert len(list(loader)) == 1


def test_a_cache_of_features_needs_threads(manifest: Path) -> None:
    with pytest.raises(ValidationError, match=r"keep\.loader to 'threads'"):
        recipe(
            manifest,
            [STAGE | {"steps": 1, "cache": "features"}],
            data={"x": {"manifest": str(manifest)}},
            keep={"loader": "processes"},
        )
