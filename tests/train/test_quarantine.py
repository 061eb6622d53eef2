"""Clips that cannot be used are left out, listed and counted, in the same way however a run is cut into pieces."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from pal.audio import load
from pal.data.collate import Collator
from pal.data.manifest import Manifest
from pal.errors import AudioError, TrainingError
from pal.model import PalModel
from pal.train import run
from pal.train.curves import read_log
from pal.train.distributed import HostReduce
from pal.train.quarantine import LeftOut, Quarantine
from pal.train.recipe import Recipe
from pal.train.sources import StageData, open_sources
from pal.train.step import Update
from tests.counts import FULL, repeats
from tests.models import tiny_model
from tests.train.tiny import MODEL, failing_after

RATE = 16_000
STAGE: dict[str, Any] = {
    "name": "one",
    "train": {"encoder": True, "connector": True, "projectors": True},
    "lr": 1e-2,
    "epochs": 2,
    "batch": {"clips": 2, "rows_per_clip": 2},
}


def sound(path: Path, number: int, seconds: float = 0.25) -> None:
    generator = np.random.default_rng(number)
    soundfile.write(path, 0.1 * generator.standard_normal(int(seconds * RATE)), RATE)


def truncated(path: Path, number: int) -> None:
    sound(path, number)
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(path: Path, number: int) -> None:
    samples = np.zeros(2000, dtype=np.float32)
    samples[number % 2000] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")


def flac_with_damage(path: Path, number: int) -> None:
    sound(path.with_suffix(".flac"), number)
    content = bytearray(path.with_suffix(".flac").read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    path.with_suffix(".flac").unlink()


def too_slow(path: Path, number: int) -> None:
    soundfile.write(path, np.zeros(2000), 100)


def too_many_channels(path: Path, number: int) -> None:
    soundfile.write(path, np.zeros((500, 30)), RATE)


FAULTS: list[Callable[[Path, int], object]] = [
    lambda path, number: None,  # missing
    lambda path, number: path.write_bytes(b""),
    lambda path, number: path.write_text("no sound"),
    lambda path, number: path.mkdir(),
    lambda path, number: soundfile.write(path, np.zeros(0), RATE),  # no samples
    truncated,
    not_finite,
    flac_with_damage,
    too_slow,
    too_many_channels,
]
"""Ten kinds of faulty files."""


def corpus(folder: Path, clips: int, bad: dict[int, Callable[[Path, int], object]]) -> Path:
    """Manifest of two questions about each clip; those in `bad` are faulty."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(clips):
        path = folder / f"{number}.wav"
        if number in bad:
            bad[number](path, number)
        else:
            sound(path, number)
        for turn in range(2):
            record = {"id": f"r{number}-{turn}", "instruction": f"which {turn}?", "input": "", "output": f"n{number}"}
            tags = [{"label": "even" if number % 2 else "odd"}]
            lines.append(json.dumps({**record, "audio_id": path.name, "dataset": "d", "task": "t", "tags": tags}))
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "m.jsonl"


def recipe(manifest: Path, stage: dict[str, Any] | None = None, keep: dict[str, Any] | None = None) -> Recipe:
    made = {"checkpoint_every": 2, "log_every": 1, "workers": 0} | (keep or {})
    data = {"mine": {"manifest": str(manifest)}}
    return Recipe(seed=3, model=MODEL, data=data, stages=[STAGE | (stage or {})], keep=made)


def quarantined(out: Path) -> list[dict[str, Any]]:
    return read_log(out / "quarantine.jsonl") if (out / "quarantine.jsonl").exists() else []


def weights(out: Path) -> dict[str, torch.Tensor]:
    return PalModel.from_pretrained(out / "model").state_dict()


def assert_same_run(ours: Path, whole: Path) -> None:
    a, b = weights(ours), weights(whole)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert (ours / "quarantine.jsonl").read_bytes() == (whole / "quarantine.jsonl").read_bytes()
    reports = [json.loads((out / "train.json").read_text()) for out in (ours, whole)]
    assert reports[0]["bad_clips"] == reports[1]["bad_clips"]
    assert [[stage["rows"], stage["left_out"]] for stage in reports[0]["stages"]] == [
        [stage["rows"], stage["left_out"]] for stage in reports[1]["stages"]
    ]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips, of which 1, 2 and 5 are faulty."""
    return corpus(tmp_path_factory.mktemp("bad") / "c", 8, {1: FAULTS[0], 2: truncated, 5: not_finite})


@pytest.fixture(scope="module")
def whole(bad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(recipe(bad), out)
    return out


def test_bad_clips_are_listed_once_and_counted(bad: Path, whole: Path) -> None:
    lines = quarantined(whole)
    assert sorted(Path(line["clip"]).name for line in lines) == ["1.wav", "2.wav", "5.wav"]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in lines:
        number = Path(line["clip"]).stem
        assert line["source"] == "mine" and line["records"] == [f"r{number}-0", f"r{number}-1"]
        with pytest.raises(AudioError) as caught:
            load(line["clip"], RATE)
        assert line["reason"] == str(caught.value)
    report = json.loads((whole / "train.json").read_text())
    assert report["bad_clips"] == 3 and report["skipped_steps"] == 0
    # two epochs of eight clips with two questions each
    assert report["stages"][0]["rows"] == 2 * 5 * 2 and report["stages"][0]["left_out"] == 2 * 3 * 2
    assert sum(line.get("left_out", 0) for line in read_log(whole / "log.jsonl")) == 2 * 3 * 2


def test_the_rest_of_a_batch_is_trained_as_if_the_bad_clips_were_not_in_it(bad: Path, tmp_path: Path) -> None:
    """One batch of everything: the same step as of a manifest without them."""
    stage = {"epochs": None, "steps": 1, "batch": {"clips": 8, "rows_per_clip": 2}, "train": {"projectors": True}}
    run(recipe(bad, stage), tmp_path / "bad")
    lines = [line for line in bad.read_text().splitlines() if json.loads(line)["audio_id"][0] not in "125"]
    (bad.parent / "clean.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "clean").mkdir()
    shutil.copytree(tmp_path / "bad" / "tokenizer", tmp_path / "clean" / "tokenizer")  # made of the manifest's words
    run(recipe(bad.parent / "clean.jsonl", stage), tmp_path / "clean")
    a, b = weights(tmp_path / "bad"), weights(tmp_path / "clean")
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("at", [1, 5])
def test_a_cut_run_goes_on_to_the_same_weights_and_list(
    bad: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(at))
        run(recipe(bad), tmp_path)
    run(recipe(bad), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_loader_threads_change_nothing(bad: Path, whole: Path, tmp_path: Path) -> None:
    run(recipe(bad, keep={"workers": 3, "prefetch": 5}), tmp_path)
    assert_same_run(tmp_path, whole)


def test_the_run_ends_beyond_the_limit_and_goes_on_with_a_higher_one(bad: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run(recipe(bad, keep={"max_bad": 1}), tmp_path)
    text = str(caught.value)
    second = quarantined(whole)[1]
    assert text.startswith(second["clip"]) and "\n" not in text
    assert "2 bad clips are more than keep.max_bad (1)" in text and text.endswith("continue with --resume")
    assert len(quarantined(tmp_path)) == 2
    step = second["step"] - 1  # the state before
    assert (tmp_path / "checkpoints" / f"step{step:07d}").is_dir()
    run(recipe(bad, keep={"max_bad": 3}), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_clip_that_was_mended_is_trained_on_after_a_strict_run_ended(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "c", 4, {2: truncated})
    with pytest.raises(TrainingError, match=r"2\.wav: .* 1 bad clip is more than keep\.max_bad \(0\)"):
        run(recipe(manifest, keep={"max_bad": 0}), tmp_path / "run")
    sound(tmp_path / "c" / "2.wav", 2)
    run(recipe(manifest, keep={"max_bad": 0}), tmp_path / "run", resume=True)
    assert quarantined(tmp_path / "run") == []
    corpus(tmp_path / "c", 4, {})
    run(recipe(manifest), tmp_path / "clean")
    a, b = weights(tmp_path / "run"), weights(tmp_path / "clean")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_step_without_a_usable_clip_changes_nothing(tmp_path: Path) -> None:
    """Each step has one clip; those of a bad one train nothing, neither weights nor batch statistics."""
    manifest = corpus(tmp_path / "c", 4, {0: FAULTS[1], 1: FAULTS[2]})
    stage = {"batch": {"clips": 1}, "epochs": 1}
    seen = []
    update = Update.__call__

    def noted(self: Update, *args: Any) -> Any:
        names = {f"w{i}": p.detach().clone() for i, p in enumerate(self.parameters)}
        names |= {f"s{i}": b.clone() for i, b in enumerate(self.statistics)}
        result = update(self, *args)
        after = [*self.parameters, *self.statistics]
        seen.append((result.items, all(torch.equal(x, y) for x, y in zip(names.values(), after, strict=True))))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "__call__", noted)
        run(recipe(manifest, stage), tmp_path / "run")
    assert sorted(items > 0 for items, _ in seen) == [False, False, True, True]
    assert all(same == (items == 0) for items, same in seen)
    lines = read_log(tmp_path / "run" / "log.jsonl")  # a step without items has no loss
    assert [line["step"] for line in lines] == [step for step, (items, _) in enumerate(seen, start=1) if items]


def test_no_usable_clip_at_all_ends_the_run(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "c", 3, dict.fromkeys(range(3), FAULTS[0]))
    with pytest.raises(AudioError, match=r"stage 'one': 3 clips were tried in vain: .*\.wav: "):
        run(recipe(manifest), tmp_path / "run")


@pytest.mark.parametrize(
    ("batch", "cached"),
    [({"seconds": 0.6}, False), ({"rows": 4, "bucket": 2, "turns": 2}, False), ({"rows": 3}, True)],
)
def test_every_way_of_making_batches_and_features(
    bad: Path, tmp_path: Path, batch: dict[str, Any], cached: bool
) -> None:
    stage: dict[str, Any] = {"batch": batch, "train": {"projectors": True}, "epochs": 1}
    if cached:
        stage["cache"] = str(tmp_path / "cache")
    run(recipe(bad, stage), tmp_path / "run")
    found = sorted({Path(line["clip"]).name for line in quarantined(tmp_path / "run")})
    assert found == ["1.wav", "2.wav", "5.wav"] and len(quarantined(tmp_path / "run")) == 3


def test_clips_of_unknown_length_count_as_the_mean_of_their_batches(bad: Path, tmp_path: Path) -> None:
    """Else all bad ones would meet in one batch."""
    made = recipe(bad, {"batch": {"seconds": 0.5}})
    data = StageData(made, 0, open_sources(made, tmp_path))
    assert {sum(len({*group.rows}) for group in data.sampler[step]) for step in range(4)} == {2}


def test_records_of_several_clips_and_augmentation(tmp_path: Path) -> None:
    """A record about a good and a bad clip is left out; that about the good one alone stays."""
    manifest = corpus(tmp_path, 3, {1: truncated})
    records = [json.loads(line) for line in manifest.read_text().splitlines()[::2]]
    records[0]["audio_id"] = ["2.wav", "1.wav"]
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = tiny_model("lal", warm=False)
    collate = Collator(model.tokenizer, RATE, lambda x, rate, rng, tags: (x * rng.uniform(), tags))
    found: dict[str, AudioError] = {}
    batch = collate([*Manifest(manifest)], [1, 2, 3], found)
    assert batch.records == ["r2-0"] and len(batch.waveforms) == 1 and [*found] == [str(tmp_path / "1.wav")]
    alone = collate([Manifest(manifest)[2]], [3])
    assert torch.equal(batch.waveforms[0], alone.waveforms[0])
    with pytest.raises(AudioError, match=r"1\.wav"):
        collate([*Manifest(manifest)], [1, 2, 3])


@pytest.mark.torture
def test_ten_kinds_of_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One clip in twenty is faulty; exactly those are listed, each with its kind of reason, and no step is lost."""
    clips = repeats(full=10_000, reduced=100)
    faulty = {number: FAULTS[number // 20 % len(FAULTS)] for number in range(7, clips, 20)}
    stage = {"objective": "tags", "train": {"encoder": True}, "epochs": 1, "batch": {"clips": 20}}
    rates = {}
    for name, chosen in (("clean", {}), ("faulty", faulty)):
        manifest = corpus(tmp_path / name, clips, chosen)
        made = recipe(manifest, stage, keep={"log_every": 1, "checkpoint_every": 1000, "max_bad": clips // 20})
        began = time.perf_counter()
        with caplog.at_level(logging.ERROR):
            run(made, tmp_path / f"run-{name}")
        seconds = time.perf_counter() - began
        report = json.loads((tmp_path / f"run-{name}" / "train.json").read_text())
        assert report["skipped_steps"] == 0 and report["stages"][0]["steps"] == clips // 20
        rates[name] = clips / report["stages"][0]["seconds"]
        print(f"{name}: {rates[name]:.0f} clips/s in training, {seconds:.1f} s in all")
    print(f"faulty to clean: {rates['faulty'] / rates['clean']:.3f}")
    lines = quarantined(tmp_path / "run-faulty")
    assert sorted(int(Path(line["clip"]).stem) for line in lines) == sorted(faulty)
    assert len(lines) == clips // 20
    reasons = {line["reason"].removeprefix(line["clip"]) for line in lines}
    assert len(reasons) >= (8 if FULL else 4)
    assert not (tmp_path / "run-faulty" / "skipped_steps.jsonl").exists()
    assert quarantined(tmp_path / "run-clean") == []


class OfTwo(HostReduce):
    """The exchange of the first of two processes; the other one says the same, with other records."""

    def __init__(self) -> None:
        super().__init__(1)

    def gather(self, text: str) -> list[str]:
        return [text, text.replace("mine", "theirs")]


def test_the_list_has_the_records_that_all_processes_left_out(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1, OfTwo(), writes=True)
    left_out = [LeftOut("a.wav", "a.wav: is bad", "scenes", ("mine1", "mine2"))]
    assert quarantine.meet(3, left_out) == (4, None)
    quarantine.close()
    (line,) = read_log(quarantine.path)
    assert (line["step"], line["records"]) == (3, ["mine1", "mine2", "theirs1", "theirs2"])
