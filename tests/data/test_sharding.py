"""Shards hold what the files held, and what is damaged in them is named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import pal.audio
from pal.app.cli import app
from pal.audio import tar_shards
from pal.clips import read_waveform
from pal.data.check import check
from pal.data.manifest import Manifest, Record, Turn, write_manifest
from pal.data.sharding import check_shards, shard
from pal.errors import AudioError, ConfigError, ManifestError
from pal.files import sha256

RATE = 16_000
NAMES = ["a.wav", "deep/er/b.flac", "ü ' \".wav", f"{'long' * 40}/c.flac", "d.wav"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five clips of different lengths, one of them outside of the manifest's folder and one in three records."""
    paths = [str(tmp_path / "in" / name) for name in NAMES[:4]] + [str(tmp_path / "other" / NAMES[4])]
    for i, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(i).uniform(-0.5, 0.5, 800 * (i + 1)), RATE)
    turns = (Turn("What?", "that"),)
    records = [Record(f"r{i}", (path,), turns, "what", "mine") for i, path in enumerate([*paths, paths[0]])]
    records.append(Record("both", (paths[0], paths[1]), turns, "what", "mine"))
    write_manifest(tmp_path / "in" / "m.jsonl", records)
    return tmp_path / "in" / "m.jsonl"


def test_records_and_clips_are_the_same(manifest: Path, tmp_path: Path) -> None:
    done = shard(manifest, tmp_path / "out", 8000)
    plain, sharded = Manifest(manifest), Manifest(done.manifest)
    assert (done.records, done.clips, len(sharded)) == (7, 5, 7) and done.shards > 1
    for before, after in zip(plain, sharded, strict=True):
        assert (after.id, after.turns, after.task, after.dataset) == (
            *(before.id, before.turns, before.task, before.dataset),
        )
        for old, new in zip(before.clips, after.clips, strict=True):
            assert ".tar/" in new and pal.audio.clip_exists(new) and not Path(new).exists()
            a, b = pal.audio.load(old, RATE), pal.audio.load(new, RATE)
            assert torch.equal(a.samples_N, b.samples_N) and a.seconds == b.seconds == pal.audio.seconds(new)
            assert pal.audio.clip_sha256(new) == sha256(Path(old)) == pal.audio.clip_sha256(old)
            assert pal.audio.clip_size(new) == Path(old).stat().st_size
            assert torch.equal(read_waveform(new, RATE).samples_N, a.samples_N)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:  # any program can unpack them
        assert tar.getnames()[0] == "a.wav"
    assert check_shards(tmp_path / "out").ok
    assert check(done.manifest, progress=False).ok


def test_lengths_come_from_the_index(manifest: Path, tmp_path: Path) -> None:
    done = shard(manifest, tmp_path / "out", 1 << 20)
    clip = Manifest(done.manifest)[3].clips[0]
    (tmp_path / "out" / "00000.tar").write_bytes(b"\0" * (tmp_path / "out" / "00000.tar").stat().st_size)
    assert pal.audio.seconds(clip) == 4 * 800 / RATE


def test_ids_and_datasets_of_the_file_and_place_stay(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [0.1] * 800, RATE)
    item = {"instruction": "?", "output": "!", "audio_id": "a.wav", "choices": ["!", "x"]}
    (tmp_path / "named.json").write_text(json.dumps([item, item | {"audio_id": []}]))
    before = list(Manifest(tmp_path / "named.json"))
    after = list(Manifest(shard(tmp_path / "named.json", tmp_path / "out", 1 << 20).manifest))
    assert [(r.id, r.dataset, r.task, r.choices) for r in before] == [
        (r.id, r.dataset, r.task, r.choices) for r in after
    ]
    assert before[0].id == "named:1" and after[1].clips == ()


def test_shards_can_be_sharded_again(manifest: Path, tmp_path: Path) -> None:
    once = shard(manifest, tmp_path / "once", 8000)
    twice = shard(once.manifest, tmp_path / "twice", 1 << 20)
    for before, after in zip(Manifest(manifest), Manifest(twice.manifest), strict=True):
        for old, new in zip(before.clips, after.clips, strict=True):
            assert pal.audio.clip_bytes(new) == Path(old).read_bytes()


def test_a_stopped_run_goes_on(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    shard(manifest, whole, 4000)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    read = pal.audio.clip_bytes
    for stop in range(5):
        out = tmp_path / f"stopped{stop}"
        seen: list[str] = []

        def stopping(path: str, limit: int = stop, seen: list[str] = seen) -> bytes:
            if len(seen) == limit:
                raise KeyboardInterrupt
            seen.append(path)
            return read(path)

        monkeypatch.setattr(pal.audio, "clip_bytes", stopping)
        with pytest.raises(KeyboardInterrupt):
            shard(manifest, out, 4000)
        assert not (out / "manifest.jsonl").exists()
        with pytest.raises(ConfigError, match="not complete"):
            check_shards(out)
        monkeypatch.setattr(pal.audio, "clip_bytes", lambda path, seen=seen: seen.append(path) or read(path))
        written = {path: path.stat().st_mtime_ns for path in out.glob("*.tar.index.npy")}
        assert written or stop < 2
        shard(manifest, out, 4000)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        assert all(path.stat().st_mtime_ns == at for path, at in written.items())  # whole shards are not written again
    with pytest.raises(ConfigError, match="another 'size'"):
        shard(manifest, whole, 5000)
    with pytest.raises(ConfigError, match="no folder of shards"):
        shard(manifest, manifest.parent, 4000)


def test_a_shard_whose_clips_changed_is_written_again(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(manifest, out, 100_000)
    (out / "manifest.jsonl").unlink()  # as after a stop
    changed, size = tmp_path / "in" / "a.wav", (tmp_path / "in" / "a.wav").stat().st_size
    for samples in (np.zeros(900), np.zeros(800)):  # with another number of bytes, and with the same
        soundfile.write(changed, samples, RATE)
        shard(manifest, out, 100_000)
        assert check_shards(out).ok
        moved, old = Manifest(out / "manifest.jsonl")[0], Manifest(manifest)[0]
        assert pal.audio.clip_bytes(moved.clips[0]) == Path(old.clips[0]).read_bytes()
    assert changed.stat().st_size == size


def test_a_damaged_shard_is_written_again(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(manifest, out, 4000)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    length = len(files["00001.tar.index.npy"]) - 33  # of the last member, before its digest
    for name, at in {"00001.tar": 600, "00001.tar.index.npy": length, "manifest.jsonl": 50}.items():
        damaged = bytearray(files[name])
        damaged[at] ^= 1
        (out / name).write_bytes(damaged)
        report = check_shards(out)
        assert name.removesuffix(".index.npy") in report.bad[0] and "run pal data shard again" in report.to_text()
        shard(manifest, out, 4000)
        assert check_shards(out).ok and {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_any_flipped_bit_of_an_index_s_header_is_said(manifest: Path, tmp_path: Path) -> None:
    shard(manifest, tmp_path / "out", 100_000)
    index = tmp_path / "out" / "00000.tar.index.npy"
    whole = index.read_bytes()
    for at in range(len(whole) - tar_shards.ENTRY.itemsize * 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        index.write_bytes(damaged)
        report = check_shards(tmp_path / "out")
        assert report.ok or "00000.tar" in report.bad[0]


def test_a_summary_counts(manifest: Path, tmp_path: Path) -> None:
    assert ": 7 records, 5 clips, " in shard(manifest, tmp_path / "out", 4000).to_text()
    done = shard(manifest, tmp_path / "one", 1 << 20)
    assert done.to_text().endswith(" MB in 1 shard")


def test_missing_clips_are_named_before_anything_is_written(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.wav").unlink()
    with pytest.raises(ManifestError, match=r"line 1: no audio file '.*a\.wav'"):
        shard(manifest, tmp_path / "out", 4000)
    assert not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_changed_byte_of_a_member_is_found(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed-bytes"
    if not folder.exists():
        folder.mkdir()
        for name in "abc":
            soundfile.write(folder / f"{name}.wav", [0.1] * 300, RATE)
        write_manifest(
            folder / "m.jsonl", [Record(n, (str(folder / f"{n}.wav"),), (Turn("?", "!"),), "t", "d") for n in "abc"]
        )
        shard(folder / "m.jsonl", folder / "out", 1 << 20)
    tar = folder / "out" / "00000.tar"
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        member = data.draw(st.sampled_from(opened.getmembers()))
    at = member.offset_data + data.draw(st.integers(0, member.size - 1))
    try:
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :])
        report = check_shards(folder / "out", progress=False)
        assert report.bad == [f"{tar}/{member.name}: its SHA-256 is not the index's"]
    finally:
        tar.write_bytes(whole)
    assert check_shards(folder / "out", progress=False).ok


def fault(clip: str) -> str:
    with pytest.raises(AudioError) as caught:
        pal.audio.load(clip, RATE)
    assert str(caught.value).startswith(clip)
    return str(caught.value).removeprefix(f"{clip}: ")


def test_faults_name_shard_and_member(manifest: Path, tmp_path: Path) -> None:
    short = tmp_path / "in" / "a.wav"
    short.write_bytes(short.read_bytes()[:-200])  # as a file of its own
    alone = fault(str(short))
    done = shard(manifest, tmp_path / "out", 8000)
    clip = Manifest(done.manifest)[0].clips[0]
    assert fault(clip) == alone
    assert clip in [item.where for item in check(done.manifest, progress=False).bad]
    tar = tmp_path / "out" / "00000.tar"
    assert "no such member" in fault(f"{tar}/nothing.wav")
    assert "no such file" in fault(str(tmp_path / "out" / "00009.tar" / "a.wav"))
    other = Manifest(done.manifest)[1].clips[0]
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1024])
    assert "its shard ends before it" in fault(other) and "pal data shard --check" in fault(other)
    assert any("ends" in line or "missing" in line for line in check_shards(tmp_path / "out").bad)
    tar.write_bytes(b"\0" * 512 + whole)  # an index of another tar file
    assert "does not fit" in fault(other)
    tar.write_bytes(whole)
    tar_shards.index_path(tar).write_bytes(b"no array")
    assert "no index of a shard" in fault(other)
    assert not check_shards(tmp_path / "out").ok


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_other_programs_need_no_index(manifest: Path, tmp_path: Path, form: int) -> None:
    folder = tmp_path / "in"
    with tarfile.open(tmp_path / "theirs.tar", "w", format=form) as tar:
        for name in NAMES[:2]:
            tar.add(folder / name, f"./{name}")
    for name in NAMES[:2]:
        clip = f"{tmp_path}/theirs.tar/{name}"
        assert torch.equal(pal.audio.load(clip, RATE).samples_N, pal.audio.load(folder / name, RATE).samples_N)
        assert pal.audio.seconds(clip) == pal.audio.seconds(folder / name)
    (tmp_path / "no.tar").write_bytes(b"text" * 300)
    assert "no uncompressed tar file" in fault(f"{tmp_path}/no.tar/a.wav")


def test_a_folder_with_such_a_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    soundfile.write(tmp_path / "x.tar" / "a.wav", [0.1] * 800, RATE)
    assert len(pal.audio.load(tmp_path / "x.tar" / "a.wav", RATE).samples_N) == 800
    assert "no such file" in fault(f"{tmp_path}/x.tar/b.wav")


def test_command(manifest: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "out")
    done = run(app, ["data", "shard", str(manifest), "--out", out, "--size", "8kB", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["clips"] == 5
    checked = run(app, ["data", "shard", "--check", out])
    assert checked.exit_code == 0 and checked.stdout.endswith("0 bad\nok\n")
    tar = tmp_path / "out" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:600] + b"?" + tar.read_bytes()[601:])
    checked = run(app, ["data", "shard", "--check", out])
    assert checked.exit_code == 1 and "00000.tar/a.wav: its SHA-256 is not the index's" in checked.stdout
    assert run(app, ["data", "shard", str(manifest), "--out", out, "--size", "0"]).exit_code == 2
    assert run(app, ["data", "shard", str(manifest)]).exit_code == 2
