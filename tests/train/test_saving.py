"""Checkpoints in parts of several processes, and those that a thread writes."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pal.errors import PalError
from pal.train import checkpoint, shards
from pal.train.checkpoint import State
from pal.train.distributed import ALONE, Writers
from pal.train.saving import CheckpointSaver
from pal.train.shards import Shard, StoredTensors, rows_of
from tests.train.test_checkpoint import recipe


def parts_of(tensors: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor | Shard]:
    """What one of the processes holds; numbers are in the first alone."""
    cut: dict[str, Tensor | Shard] = {}
    for name, tensor in tensors.items():
        if tensor.ndim:
            first, end = rows_of(len(tensor), part, parts)
            cut[name] = Shard(tensor[first:end], first, tuple(tensor.shape))
        elif part == 0:
            cut[name] = tensor
    return cut


def write_parts(folder: Path, tensors: dict[str, Tensor], parts: int) -> list[Path]:
    paths = [folder / f"shard-{part}-of-{parts}.safetensors" for part in range(parts)]
    for part, path in enumerate(paths):
        shards.write(parts_of(tensors, part, parts), path)
    return paths


def some_tensors(rows: list[int]) -> dict[str, Tensor]:
    return {f"w{i}": torch.randn(n, *[3] * (i % 3)) for i, n in enumerate(rows)} | {"n": torch.tensor(2.0)}


@given(rows=st.lists(st.integers(1, 7), min_size=1, max_size=4), parts=st.integers(1, 4), others=st.integers(1, 5))
def test_what_some_wrote_any_number_reads(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], parts: int, others: int
) -> None:
    tensors = some_tensors(rows)
    found = StoredTensors(write_parts(tmp_path_factory.mktemp("parts"), tensors, parts))
    assert set(found) == set(tensors) and len(found) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        if tensor.ndim:
            read = [found.rows(name, *rows_of(len(tensor), part, others)) for part in range(others)]
            assert [len(part) for part in read] == [len(c) for c in tensor.chunk(others)] + [0] * (
                others - len(tensor.chunk(others))
            )
            assert torch.equal(torch.cat(read), tensor) and {part.shape[1:] for part in read} == {tensor.shape[1:]}


def test_torch_reads_them_and_they_read_what_torch_writes(tmp_path: Path) -> None:
    tensors = some_tensors([5, 4, 1])
    (tmp_path / "ours").mkdir()
    write_parts(tmp_path / "ours", tensors, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "ours")), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    theirs = StoredTensors((tmp_path / "theirs").glob("*.safetensors"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


class Slow:
    """In place of `checkpoint.save`: waits until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.running, self.most = threading.Event(), 0, 0
        self.save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, *args: Any) -> Path:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.go.wait(60)
        path = self.save(*args)
        self.running -= 1
        return path


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    saver = CheckpointSaver(tmp_path, recipe())
    weight, average, state = torch.ones(3), torch.ones(3), State(step=1, totals=[{"seconds": 1.0}])
    rows = Shard(torch.ones(2), 0, (2,))
    saver.save(state, {"w": weight, "s": rows}, {"w/exp_avg": average}, ALONE)
    for tensor in (weight, average, rows.rows):
        tensor.add_(1)
    state.step, state.totals[0]["seconds"] = 2, 2.0
    slow.go.set()
    saver.wait()
    found = checkpoint.load_newest(tmp_path, recipe())
    assert found is not None and found.state == State(step=1, totals=[{"seconds": 1.0}])
    for tensor in (found.weights["w"], found.optimizer["w/exp_avg"]):
        assert torch.equal(tensor, torch.ones(3))
    assert torch.equal(found.weights["s"], torch.ones(2))


def test_training_goes_on_while_one_is_written_and_waits_for_it_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    saver = CheckpointSaver(tmp_path, recipe())
    saver.save(State(step=1), {"w": torch.ones(1)}, {}, ALONE)
    saver.check()  # does not wait
    assert not list(tmp_path.glob("step*"))
    threading.Timer(0.05, slow.go.set).start()
    saver.save(State(step=2), {"w": torch.ones(1)}, {}, ALONE)
    assert checkpoint.path_of(tmp_path, State(step=1)).is_dir()
    saver.wait()
    assert checkpoint.path_of(tmp_path, State(step=2)).is_dir()
    assert slow.most == 1


def test_an_error_of_the_thread_reaches_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    saver = CheckpointSaver(tmp_path, recipe())
    for wait in (saver.wait, lambda: saver.save(State(step=2), {}, {}, ALONE)):
        saver.save(State(step=1), {"w": torch.ones(1)}, {}, ALONE)
        with pytest.raises(OSError, match="No space left"):
            wait()
    assert list(tmp_path.iterdir()) == []  # nothing half written


def test_names_of_the_files_of_several_writers() -> None:
    assert Writers(1, 3).file("weights") == "weights-00002-of-00003.safetensors"
    assert [Writers(1, 3).file("weights", writer) for writer in (0, 2)] == [
        "weights-00001-of-00003.safetensors",
        "weights-00003-of-00003.safetensors",
    ]
    assert ALONE.file("optimizer") == "optimizer.safetensors"


def test_no_checkpoint_of_which_another_process_could_not_write_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one of two processes is not the one that fails."""
    blocks = iter([0, 1])  # how many others fail, block by block
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda failed, group: failed.add_(next(blocks)))
    two = Writers(0, 2, object())
    with pytest.raises(PalError, match="1 of 2 processes could not write the checkpoint"):
        checkpoint.save(tmp_path, State(step=1), recipe(), {"w": torch.ones(1)}, {}, 2, two)
    assert not list(tmp_path.iterdir())
