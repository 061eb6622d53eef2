"""A full disk, a folder that cannot be written, and checkpoints that were damaged: nothing good is lost."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pal.app.cli import app
from pal.errors import TrainingError
from pal.model import PalModel
from pal.train import Trainer, checkpoint, run
from pal.train.checkpoint import State
from pal.train.disk import naming_disk_faults
from pal.train.recipe import Recipe
from tests.counts import repeats
from tests.train.tiny import recipe

STAGE: dict[str, Any] = {"train": {"projectors": True, "llm": "full"}, "lr": 1e-2, "steps": 4, "batch": {"clips": 2}}


def made(manifest: Path) -> Recipe:
    keep = {"checkpoint_every": 1, "log_every": 1, "checkpoints": 2}
    return recipe(manifest, [STAGE], data={"scenes": {"manifest": str(manifest)}}, keep=keep)


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(made(manifest), out)
    return out


@pytest.fixture(scope="module")
def started(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of its first two steps."""
    out = tmp_path_factory.mktemp("started")
    for step in Trainer(made(manifest), out).steps():
        if step == 2:
            break
    return out


def assert_same_weights(ours: Path, whole: Path) -> None:
    a, b = (PalModel.from_pretrained(out / "model").state_dict() for out in (ours, whole))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block, every write beyond this size of a file fails in the system's call, in any library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.torture
def test_a_full_disk_leaves_the_checkpoints_and_ends_with_one_line(
    manifest: Path, whole: Path, started: Path, tmp_path: Path
) -> None:
    """The writers of a checkpoint are stopped after so many bytes: of the weights, the optimizer's state, the JSON."""
    checkpoints = started / "checkpoints"
    sizes = sorted({path.stat().st_size for path in (checkpoints / "step0000002").iterdir()})
    chosen = random.Random(1)
    count = repeats(full=20, reduced=4)
    offsets = [0, *(size - 1 for size in sizes), *(chosen.randrange(1, sizes[-1]) for _ in range(20))][:count]
    for number, offset in enumerate(offsets):
        out = tmp_path / str(number)
        shutil.copytree(started, out)
        before = contents(checkpoints)
        trainer = Trainer(made(manifest), out, resume=True)
        with largest_file(offset), pytest.raises(TrainingError) as caught:
            list(trainer.steps())
        assert contents(out / "checkpoints") == before, offset
        text = str(caught.value)
        assert text.startswith(f"{out}") and "File too large (" in text and "continue with --resume" in text
        assert "\n" not in text
        run(made(manifest), out, resume=True)
        assert_same_weights(out, whole)


def test_the_command_ends_with_status_1_and_one_line(manifest: Path, started: Path, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path / "run")
    settings = made(manifest).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    with largest_file(100):
        result = CliRunner().invoke(
            app, ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume"]
        )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}")
    assert "File too large (" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_a_file_system_that_is_full(manifest: Path, whole: Path, started: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    size = sum(path.stat().st_size for path in started.rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 150_000}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        shutil.copytree(started, place / "run")
        free = shutil.disk_usage(place).free
        (place / "ballast").write_bytes(b"\0" * max(0, free - 40_000))
        before = contents(place / "run" / "checkpoints")
        with pytest.raises(TrainingError, match=r"small/run.*: No space left on device \(0\.0 MB free\)"):
            run(made(manifest), place / "run", resume=True)
        assert contents(place / "run" / "checkpoints") == before
        (place / "ballast").unlink()
        shutil.copytree(place / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    run(made(manifest), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", whole)


@contextmanager
def without_rights() -> Iterator[None]:
    """Within the block, root is nobody, whom the permissions of files concern."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written(manifest: Path, started: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # else nobody could not even look into it
        out = Path(name) / "run"
        shutil.copytree(started, out)
        trainer = Trainer(made(manifest), out, resume=True)
        before = contents(out / "checkpoints")
        for path in [out, *out.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with without_rights(), pytest.raises(TrainingError) as caught:
            list(trainer.steps())
        assert "Permission denied" in str(caught.value) and f"Make {out} writable" in str(caught.value)
        assert contents(out / "checkpoints") == before
        with without_rights(), pytest.raises(TrainingError, match="Permission denied"):
            Trainer(made(manifest), out / "new")
        for path in [out, *out.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_the_system_says_becomes_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(TrainingError, match=os.strerror(number)), naming_disk_faults(tmp_path):
        raise OSError(number, os.strerror(number))


def test_what_a_library_in_rust_says_does_too(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No space left on device"), naming_disk_faults(tmp_path):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does


def test_other_errors_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), naming_disk_faults(tmp_path / "run"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(PermissionError), naming_disk_faults(tmp_path / "run"):  # of another folder
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.jsonl"))
    with pytest.raises(KeyError), naming_disk_faults(tmp_path):
        raise KeyError("x")


# Damaged checkpoints


def small() -> Recipe:
    return Recipe(
        model={"llm": "x/y", "encoders": ["tiny"]},
        data={"a": {"manifest": "a.jsonl"}},
        stages=[{"train": {"llm": "full"}, "lr": 1.0, "steps": 1, "batch": {"rows": 1}}],
    )


def save(folder: Path, step: int) -> Path:
    tensors = {"w": torch.full((5,), float(step))}
    return checkpoint.save(folder, State(step=step, stage_step=step), small(), tensors, {"w/exp_avg": tensors["w"]}, 2)


def flipped(content: bytes, chosen: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
    return bytes(changed)


def cut(content: bytes, chosen: random.Random) -> bytes:
    # all before the last byte: that of a JSON file is a line feed, without which nothing is missing
    return content[: chosen.randrange(len(content) - 1)]


@pytest.mark.torture
@pytest.mark.parametrize(
    ("damage", "count"), [(flipped, repeats(full=1000, reduced=60)), (cut, repeats(full=50, reduced=12))]
)
def test_no_damaged_checkpoint_is_loaded(
    tmp_path: Path, damage: Any, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever bit is flipped and wherever a file is cut, the file is named and the checkpoint before it is used."""
    save(tmp_path / "good", 1)
    newest = save(tmp_path / "good", 2)
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    chosen = random.Random(5)
    for number in range(count):
        folder = tmp_path / "tried"
        shutil.copytree(tmp_path / "good", folder)
        name = names[number % len(names)]
        file = folder / "step0000002" / name
        file.write_bytes(damage(file.read_bytes(), chosen))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = checkpoint.load_newest(folder, small())
        assert found is not None and found.state.step == 1, (name, number)
        assert torch.equal(found.weights["w"], torch.ones(5))
        assert "checkpoint step0000002 is damaged" in caplog.text
        assert f"/{name}" in caplog.text or name == "manifest.json"  # whose changed names are those of missing files
        assert (folder / "step0000002.damaged").is_dir() and not (folder / "step0000002").exists()
        shutil.rmtree(folder)


def test_where_no_checkpoint_is_intact_a_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_newest(tmp_path, small()) is None
    assert caplog.messages[-1] == f"{tmp_path} holds no intact checkpoint; training begins at step 0"
