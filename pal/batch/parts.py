"""`AnswerParts`: the answers of an unfinished `pal batch`, from which its output is joined.

OUT.parts/
    settings.json         what the answers depend on
    lock                  held by the process that writes
    part.ID.jsonl         of one worker: its model's digest, then each clip when it is begun, and again with its answers

Each line begins with the SHA-256 of its JSON, and is written once a clip's questions are answered. So a killed run
loses the clips in work alone, and a line cut by the kill is known by its digest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pal.errors import BundleError, ConfigError
from pal.files import jsonable, locked, replacing, write_json, write_text

_SETTINGS, _LOCK, _TEMPORARY = "settings.json", "lock", "temporary"
_DIGITS = 64
"""Hexadecimal digits of a line's SHA-256."""


def stamp(clips: Sequence[str]) -> list[list[int] | None]:
    """Size and time of the last change (in nanoseconds) of each file; None for one that is not there."""
    found: list[list[int] | None] = []
    for clip in clips:
        try:
            state = Path(clip).stat()
            found.append([state.st_size, state.st_mtime_ns])
        except (OSError, ValueError):
            found.append(None)
    return found


class PartWriter:
    """Part of one worker; lines are handed to the operating system as they are written.

    Args:
        folder: of the parts.
        digest: of the worker's model.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._file = (folder / f"part.{uuid.uuid4().hex}.jsonl").open("a", encoding="utf-8", newline="\n")
        self._write({"model": digest})

    def begin(self, key: str) -> None:
        """Note that a clip is begun, so that one that ends its worker is found."""
        self._write({"begun": key})

    def add(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Add the outcome of a clip."""
        self._write({"key": key, **outcome})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(_line(content))
        self._file.flush()


class AnswerParts:
    """The folder of the parts of an output file.

    Args:
        out: the output file, beside which the folder lies.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.parts")
        self.model: str | None = None
        """Digest of the model of the kept answers; None without any."""
        self.kept: dict[str, tuple[Path, int]] = {}
        """Key of each answered clip -> file and offset of its line."""
        self.damaged = 0
        """Lines that are not what was written; their clips are asked again."""

    @contextmanager
    def open(
        self, settings: Mapping[str, Any], files: Mapping[str, Sequence[str]], overwrite: bool = False
    ) -> Iterator[AnswerParts]:
        """Start or go on, alone; `kept` then has the answered clips among `files` whose audio files are unchanged.

        Args:
            settings: what the answers depend on.
            files: key of each clip that is asked about -> its audio files.
            overwrite: leave earlier answers and an earlier output out.

        Raises:
            ConfigError: parts of a run with other settings, a finished output, or another process that writes.
            BundleError: the settings of the parts cannot be read.
        """
        settings = jsonable(settings)
        if not overwrite and self.out.exists() and not self.folder.exists():
            raise ConfigError(f"{self.out}: is there already; give another --out, or --overwrite")
        ours = self._parts() or any((self.folder / name).exists() for name in (_LOCK, _TEMPORARY))
        if not ours and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder}: is there, and is not of pal batch; move it, or give another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        refusal = f"{self.out}: another pal batch is writing it; wait for its end, or give another --out"
        with locked(self.folder / _LOCK, refusal):
            self._remove_temporary()
            path = self.folder / _SETTINGS
            if overwrite:
                self._remove_parts()
            elif path.is_file():
                self.reload()
                if any(self.outcome(key).get("failed") is None for key in self.kept):
                    self._compare(path, settings)
            write_json(path, settings)
            self._keep_answered(files)
            try:
                yield self
            finally:
                self._remove_temporary()
                if not self._parts():  # such as where the model could not be loaded
                    self.remove()

    def reload(self) -> Counter[str]:
        """Find the answered clips again; returns how often each of the others was begun.

        Failed clips count as answered: they have been tried in this run.
        """
        self.kept, begun, models = {}, Counter[str](), set()
        for path in self._parts():
            lines = list(_read(path))
            if not any("model" in content for _, content in lines):
                continue  # nobody knows whose answers these are
            for offset, content in lines:
                if "key" in content:
                    self.kept[content["key"]] = (path, offset)
                elif "begun" in content:
                    begun[content["begun"]] += 1
                elif "model" in content:
                    models.add(content["model"])
        if len(models) > 1:
            raise BundleError(f"{self.folder}: holds answers of two models; give --overwrite to ask anew with one")
        self.model = next(iter(models), None)
        return Counter({key: times for key, times in begun.items() if key not in self.kept})

    def outcome(self, key: str) -> dict[str, Any]:
        """Outcome of an answered clip, read from its part."""
        path, offset = self.kept[key]
        with path.open("rb") as file:
            file.seek(offset)
            found = _parse(file.readline())
        if found is None:
            raise BundleError(f"{path}: changed while it was read; run the same pal batch again")
        return found

    def temporary(self, path: Path) -> None:
        """Note a temporary folder, so that the next run removes it where this one is killed."""
        write_text(self.folder / _TEMPORARY, str(path))

    def remove(self) -> None:
        """Delete the folder, once the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part.*.jsonl"))

    def _remove_parts(self) -> None:
        for path in self._parts():
            path.unlink()

    def _remove_temporary(self) -> None:
        noted = self.folder / _TEMPORARY
        if noted.is_file():
            shutil.rmtree(noted.read_text(encoding="utf-8"), ignore_errors=True)
            noted.unlink()

    def _compare(self, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise BundleError(f"{path}: is not JSON; give --overwrite to ask anew") from None
        other = [key for key in settings if before.get(key) != settings[key]]
        if other:
            raise ConfigError(
                f"{self.folder}: holds an unfinished run with another '{other[0]}'; give another --out, or --overwrite"
            )

    def _keep_answered(self, files: Mapping[str, Sequence[str]]) -> None:
        """Join what earlier runs answered in one part: without failures, which are tried again, and changed clips."""
        before = self._parts()
        self.reload()
        self.damaged = sum(content is None for path in before for content in _contents(path))
        kept = 0
        joined = self.folder / f"part.{uuid.uuid4().hex}.jsonl"
        with replacing(joined) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(_line({"model": self.model}))
            for key in self.kept:
                outcome = self.outcome(key)
                if key in files and outcome.get("failed") is None and outcome["files"] == stamp(files[key]):
                    file.write(_line(outcome))
                    kept += 1
        for path in [*before, *([] if kept else [joined])]:
            path.unlink()
        self.reload()


def _line(content: Mapping[str, Any]) -> str:
    # ASCII, so that names that are not UTF-8 can be written, too
    text = json.dumps(content, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Content of a line; None if it is not whole."""
    text = line[_DIGITS + 1 : -1]
    if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest().encode() != line[:_DIGITS]:
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, content) of each whole line."""
    with path.open("rb") as file:
        offset = 0
        for line in file:
            content = _parse(line)
            if content is not None:
                yield offset, content
            offset += len(line)


def _contents(path: Path) -> Iterable[dict[str, Any] | None]:
    """Content of each line but an incomplete last one, which a kill leaves."""
    with path.open("rb") as file:
        return [_parse(line) for line in file if line.endswith(b"\n")]
