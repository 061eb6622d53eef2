"""Outputs of a check: the manifest without unusable records, and the list of bad clips for `skip_clips`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pal.data.check import ManifestReport
from pal.data.manifest import Manifest, portable
from pal.data.tables import lines_of
from pal.errors import ConfigError, ManifestError
from pal.files import write_bytes, writing


@dataclass(frozen=True)
class Cleaned:
    """Summary of a cleaned manifest."""

    out: str
    records: int
    faulty: int
    """Number of records left out because they are unusable themselves."""
    of_bad_clips: int
    """Number of records left out because of an unusable clip."""

    def to_text(self) -> str:
        """Summary in one line."""
        left_out = self.faulty + self.of_bad_clips
        why = f" ({self.faulty} cannot be used, {self.of_bad_clips} have a bad clip)" if left_out else ""
        return f"{self.out}: {self.records} records, {left_out} left out{why}"


def check_out(out: Path, manifest: str | Path) -> None:
    """Refuse, before the long check, to overwrite the manifest that is checked.

    Raises:
        ConfigError: `out` is the manifest itself, or a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; give the file to write")
    if out.exists() and Path(manifest).exists() and out.samefile(manifest):
        raise ConfigError(f"{out}: is the manifest that is checked, which is never changed; give another file")


def write_clean(
    manifest: str | Path, report: ManifestReport, out: str | Path, root: str | Path | None = None
) -> Cleaned:
    """Write the usable records, with unchanged bytes and order, atomically.

    The format (JSON Lines or a list) stays. Paths relative to the manifest's folder are rewritten if `out` lies in
    another folder; with `root` all paths stay, and the new manifest needs the same root. A record without `id` or
    `dataset` is named after the new file.

    Args:
        manifest: the file that was checked.
        report: of `check`.
        out: the file to write.
        root: folder of the audio, as for `check`.

    Raises:
        ConfigError: `out` is the manifest itself.
        ManifestError: nothing is left, or the report is not of this whole file.
    """
    out = Path(out)
    check_out(out, manifest)
    records = Manifest(manifest, root)
    if not report.complete or records.digest != report.digest:
        raise ManifestError(f"{manifest}: the check was interrupted, or the file has changed since; check it again")
    bad, clips = set(report.bad_records), set(report.bad_clips)
    of_bad_clips = kept = 0
    moved = records.root is None and out.parent.resolve() != records.folder.resolve()
    with writing(out) as file:
        for at, text in enumerate(records.raw()):
            if at in bad:
                continue
            if clips and not clips.isdisjoint(records[at].clips):
                of_bad_clips += 1
                continue
            line = _moved(text, records, out.parent) if moved else text
            if records.is_list:
                file.write((b",\n" if kept else b"[\n") + line)
            else:
                file.write(line + b"\n")
            kept += 1
        if not kept:
            raise ManifestError(f"{manifest}: no record can be used, so {out} is not written; mend the listed ones")
        if records.is_list:
            file.write(b"\n]\n")
    return Cleaned(str(out), kept, len(bad), of_bad_clips)


def _moved(text: bytes, records: Manifest, folder: Path) -> bytes:
    """The record with paths to the same clips from another folder."""
    raw = json.loads(text)
    given = raw["audio_id"]
    paths = [portable(records.locate(clip), folder) for clip in ([given] if isinstance(given, str) else given)]
    raw["audio_id"] = paths[0] if isinstance(given, str) else paths
    try:
        return json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8
        return json.dumps(raw).encode()


def write_bad(report: ManifestReport, out: str | Path) -> int:
    """Write the list of unreadable clips, one path a line, for a recipe's `skip_clips`; returns their number.

    A path that does not fit on a line as it is, such as one with a line break, is written as a JSON string.
    """
    plain = (clip.isprintable() and clip == clip.strip() and not clip.startswith('"') for clip in report.bad_clips)
    lines = [clip if is_plain else json.dumps(clip) for clip, is_plain in zip(report.bad_clips, plain, strict=True)]
    write_bytes(Path(out), "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def read_clips(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and path of each clip in a list of `write_bad` or of the user; empty lines are skipped.

    Blanks around a path are stripped, unless the path is a JSON string. There are no comments, since names may begin
    with #.

    Raises:
        ManifestError: the file cannot be read, or a line that begins with a quote is not a JSON string.
    """
    try:
        lines = lines_of(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        try:
            clip = json.loads(line) if line.startswith('"') else line
        except ValueError:
            raise ManifestError(
                f"{path}, line {number}: a line that starts with a quote must be a JSON string"
            ) from None
        yield number, clip
