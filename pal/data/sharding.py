"""Shards: the clips of a manifest in uncompressed tar files, with byte-offset indexes and a manifest of their members.

OUT/
    shards.json             the manifest that was sharded, and the number of shards; written first, and again at the end
                            with the SHA-256 of manifest.jsonl
    00000.tar               clips, byte for byte
    00000.tar.index.npy     offset, size, length and SHA-256 of each (`pal.audio.tar_shards`)
    manifest.jsonl          the records, whose clips are `00000.tar/NAME`; written last

Each file is written whole or not at all. A run that was stopped goes on: shards that are there are compared, byte for
byte, and those that are missing, damaged or of clips that have changed since are written.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import pal.audio
from pal.audio.tar_shards import TarShard, index_path, member_key, sorted_entries
from pal.data.manifest import Manifest, portable
from pal.errors import AudioError, ConfigError, ManifestError
from pal.files import replacing, sha256, write_json, writing

PLAN = "shards.json"
MANIFEST = "manifest.jsonl"

_MEND = "copy these again; or run pal data shard again, which writes anew what is damaged"
_BLOCK = tarfile.BLOCKSIZE


class _ShardClip(NamedTuple):
    path: str
    name: str
    size: int


@dataclass(frozen=True)
class Shards:
    """Summary of what `shard` wrote."""

    manifest: str
    records: int
    clips: int
    shards: int
    bytes: int
    """Bytes of the clips."""

    def to_text(self) -> str:
        """Summary in one line."""
        size = f"{self.bytes / 1e6:.1f} MB"
        records, clips, shards = (
            f"{number} {name}{'' if number == 1 else 's'}"
            for number, name in ((self.records, "record"), (self.clips, "clip"), (self.shards, "shard"))
        )
        return f"{self.manifest}: {records}, {clips}, {size} in {shards}"


@dataclass
class ShardReport:
    """Report of `check_shards`."""

    folder: str
    shards: int = 0
    clips: int = 0
    bad: list[str] = field(default_factory=list)
    """What is wrong, one sentence with the path of the shard or member."""

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.bad

    def to_text(self) -> str:
        """The report as text."""
        lines = [f"{self.folder}: {self.shards} shards, {self.clips} clips, {len(self.bad)} bad"]
        return "\n".join([*lines, *(f"bad: {fault}" for fault in self.bad), "ok" if self.ok else _MEND])


def shard(
    manifest: str | Path, out: str | Path, size: int, root: str | Path | None = None, progress: bool = True
) -> Shards:
    """Copy the clips of a manifest into shards. Nothing is decoded or encoded anew, and the manifest is not changed.

    Args:
        manifest: path of the file.
        out: folder to write; new, empty, or of the same call that was stopped.
        size: bytes after which a shard is full; a larger clip is a shard of its own.
        root: folder of the audio, see `Manifest`.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ConfigError: `out` holds something else.
        ManifestError: a faulty record, or a clip that does not exist.
        AudioError: a clip that changed or cannot be read.
    """
    records, out = Manifest(manifest, root), Path(out)
    plan = {
        "format": 1,
        "manifest": records.digest,
        "root": None if records.root is None else str(records.root),
        "size": size,
    }
    _check(out, plan)
    shards = list(_planned(records, size))
    names = {clip.path: f"{_name(i)}/{clip.name}" for i, clips in enumerate(shards) for clip in clips}
    plan["shards"] = len(shards)
    write_json(out / PLAN, plan)
    total = sum(len(clips) for clips in shards)
    with tqdm(total=total, desc="clips", delay=2, disable=None if progress else True, file=sys.stderr) as bar:
        for i, clips in enumerate(shards):
            path = out / _name(i)
            if not _is_written(path, clips):
                _write(path, clips)
            bar.update(len(clips))
    with writing(out / MANIFEST) as file:
        for at, text in enumerate(records.raw()):
            file.write(json.dumps(_moved(text, records, at, names), ensure_ascii=False).encode() + b"\n")
    write_json(out / PLAN, plan | {"manifest_sha256": sha256(out / MANIFEST)})
    size = sum(clip.size for clips in shards for clip in clips)
    return Shards(str(out / MANIFEST), len(records), total, len(shards), size)


def check_shards(folder: str | Path, progress: bool = True) -> ShardReport:
    """Read every member of the shards in a folder and compare it with the index, and the manifest with its digest.

    Raises:
        ConfigError: no folder of `shard`, or one that is not complete.
    """
    folder = Path(folder)
    plan = _known_plan(folder)
    count, digest = plan.get("shards"), plan.get("manifest_sha256")
    if not isinstance(count, int) or digest is None or not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder}: is not complete; run pal data shard again, which goes on")
    report = ShardReport(str(folder), count)
    if sha256(folder / MANIFEST) != digest:
        report.bad.append(f"{folder / MANIFEST}: its SHA-256 is not that of {PLAN}")
    for i in tqdm(range(count), "shards", delay=2, disable=None if progress else True, file=sys.stderr):
        path = folder / _name(i)
        if not path.is_file() or not index_path(path).is_file():
            report.bad.append(f"{path}: the shard or its index is missing")
            continue
        try:
            report.clips += _check_shard(path, report.bad)
        except (pal.audio.DecodeError, OSError, tarfile.TarError) as error:
            report.bad.append(f"{path}: {error}")
    return report


def _check_shard(path: Path, bad: list[str]) -> int:
    """Compare the members of one shard with its index; returns their number."""
    opened = TarShard(str(path))
    unseen = {int(offset) for offset in opened.entries["offset"]}
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                count += 1
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                try:
                    entry = opened.find(member.name)
                except pal.audio.DecodeError:
                    bad.append(f"{path}/{member.name}: the index does not have it")
                    continue
                unseen.discard(int(entry["offset"]))
                if (int(entry["offset"]), int(entry["size"])) != (member.offset_data, len(data)):
                    bad.append(f"{path}/{member.name}: is not where the index says")
                elif hashlib.sha256(data).digest() != entry["sha256"].tobytes():
                    bad.append(f"{path}/{member.name}: its SHA-256 is not the index's")
                elif not np.array_equal(entry["seconds"], _seconds(data), equal_nan=True):
                    bad.append(f"{path}/{member.name}: its length is not the index's")
    except tarfile.TarError as error:
        bad.append(f"{path}: after {count} members: {error}")
    if unseen:
        bad.append(f"{path}: {len(unseen)} members of the index are missing, the first at byte {min(unseen)}")
    return count


def _check(out: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder with something else in it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    known = _known_plan(out)
    other = next((key for key in plan if known.get(key) != plan[key]), None)
    if other is not None:
        raise ConfigError(f"{out}: holds shards made with another '{other}'; give another folder")


def _known_plan(folder: Path) -> dict[str, Any]:
    try:
        plan = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError):
        plan = None
    if not isinstance(plan, dict):
        raise ConfigError(f"{folder}: is no folder of shards; give an empty folder to write, or one with {PLAN}")
    return plan


def _planned(records: Manifest, size: int) -> Iterator[list[_ShardClip]]:
    """The clips of each shard, in the order in which the manifest first names them."""
    base = records.root or records.folder
    names: set[str] = set()
    seen: set[str] = set()
    clips: list[_ShardClip] = []
    full = 0
    for at, record in enumerate(records):
        for path in record.clips:
            if path in seen:
                continue
            seen.add(path)
            bytes_ = pal.audio.clip_size(path)
            if bytes_ < 0:
                raise ManifestError(
                    f"{records.path}, {records.where(at)}: no audio file '{path}'; is the root right? pal data check "
                    "--write-clean FILE writes a manifest without it"
                )
            name = portable(path, base)
            name = name if not name.startswith("/") else f"outside{name}"
            while name in names:
                name = f"_{name}"
            names.add(name)
            if clips and full + bytes_ > size:
                yield clips
                clips, full = [], 0
            clips.append(_ShardClip(path, name, bytes_))
            full += bytes_
    if clips:
        yield clips


def _is_written(path: Path, clips: list[_ShardClip]) -> bool:
    """True if a shard is there as it would be written: its index, and the bytes of the clips and of its members."""
    if not path.is_file() or not index_path(path).is_file():
        return False
    try:
        opened = TarShard(str(path))
        wanted = sorted((*member_key(clip.name), clip.size) for clip in clips)
        if [(int(e["key"][0]), int(e["key"][1]), int(e["size"])) for e in opened.entries] != wanted:
            return False
        for clip in clips:
            data, entry = _bytes(clip), opened.find(clip.name)
            if opened.read(clip.name, clip.size) != data or hashlib.sha256(data).digest() != entry["sha256"].tobytes():
                return False
            if not np.array_equal(entry["seconds"], _seconds(data), equal_nan=True):
                return False
    except (pal.audio.DecodeError, OSError):
        return False
    return True


def _write(path: Path, clips: list[_ShardClip]) -> None:
    index_path(path).unlink(missing_ok=True)  # of an older shard
    entries = []
    with replacing(path) as temporary, tarfile.open(temporary, "w:", format=tarfile.PAX_FORMAT) as tar:
        for clip in clips:
            data = _bytes(clip)
            member = tarfile.TarInfo(clip.name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            padded = -(-len(data) // _BLOCK) * _BLOCK
            entries.append(
                (
                    member_key(clip.name),
                    tar.offset - padded,
                    len(data),
                    _seconds(data),
                    hashlib.sha256(data).digest(),
                )
            )
    with writing(index_path(path)) as file:
        np.save(file, sorted_entries(entries), allow_pickle=False)


def _bytes(clip: _ShardClip) -> bytes:
    data = pal.audio.clip_bytes(clip.path)
    if len(data) != clip.size:
        raise AudioError(f"{clip.path}: has changed while it was put into a shard; start again")
    return data


def _seconds(data: bytes) -> float:
    """Length of a clip by its header; NaN if that does not say."""
    try:
        return pal.audio.seconds_of(data)
    except AudioError:
        return float("nan")


def _moved(text: bytes, records: Manifest, at: int, names: dict[str, str]) -> dict[str, Any]:
    """The record with the members' names, and with the names that it has from its file and place."""
    raw: dict[str, Any] = json.loads(text)
    record = records[at]
    clips = [names[clip] for clip in record.clips]
    raw["audio_id"] = clips[0] if isinstance(raw["audio_id"], str) else clips
    return raw | {"id": record.id, "dataset": record.dataset}


def _name(number: int) -> str:
    return f"{number:05d}.tar"
