"""What follows a check: the manifest without what is bad, and the list of bad clips that training may skip."""

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
    """What `write_clean` wrote."""

    out: str
    records: int
    faulty: int
    """Records left out that cannot be used themselves."""
    of_bad_clips: int
    """Records left out that are about a clip that cannot be used."""

    def to_text(self) -> str:
        """One line."""
        left_out = self.faulty + self.of_bad_clips
        why = f" ({self.faulty} cannot be used, {self.of_bad_clips} have a bad clip)" if left_out else ""
        return f"{self.out}: {self.records} records, {left_out} left out{why}"


def check_out(out: Path, manifest: str | Path) -> None:
    """Refuse, before the long check, to write over what is checked.

    Raises:
        ConfigError: `out` is the manifest itself, or a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; give the file to write")
    if out.exists() and Path(manifest).exists() and out.samefile(manifest):
        raise ConfigError(f"{out}: is the manifest that is checked, which stays as it is; give another file")


def write_clean(
    manifest: str | Path, report: ManifestReport, out: str | Path, root: str | Path | None = None
) -> Cleaned:
    """Write the records that can be used, as they stand in the manifest and in their order, whole or not at all.

    JSON Lines stay JSON Lines, a list a list. Where paths are relative to the manifest's folder and `out` lies in
    another one, they are written anew; with `root` all paths stay, and the new manifest needs the same root. A record
    without `id` or `dataset` is named after the new file.

    Args:
        manifest: the file that was checked.
        report: what `check` found.
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
        raise ManifestError(f"{manifest}: was not checked to its end, or changed since; check it again")
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
            raise ManifestError(f"{manifest}: no record can be used, so {out} is not written; mend what is listed")
        if records.is_list:
            file.write(b"\n]\n")
    return Cleaned(str(out), kept, len(bad), of_bad_clips)


def _moved(text: bytes, records: Manifest, folder: Path) -> bytes:
    """A record whose paths lead to the same clips from another folder."""
    raw = json.loads(text)
    given = raw["audio_id"]
    paths = [portable(records.locate(clip), folder) for clip in ([given] if isinstance(given, str) else given)]
    raw["audio_id"] = paths[0] if isinstance(given, str) else paths
    try:
        return json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8
        return json.dumps(raw).encode()


def write_bad(report: ManifestReport, out: str | Path) -> int:
    """Write the clips that cannot be read, one path a line, for `skip_clips` of a recipe; gives their number.

    A path that a line cannot hold as it is, such as one with a line break, is written as a JSON string.
    """
    plain = (clip.isprintable() and clip == clip.strip() and not clip.startswith('"') for clip in report.bad_clips)
    lines = [clip if is_plain else json.dumps(clip) for clip, is_plain in zip(report.bad_clips, plain, strict=True)]
    write_bytes(Path(out), "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def read_clips(path: Path) -> Iterator[tuple[int, str]]:
    """Number and path of each line that `write_bad` wrote, or somebody by hand; empty lines are none.

    Blanks around a path are none of it, unless it stands in a JSON string. There are no comments, since
    names may begin with #.

    Raises:
        ManifestError: the file cannot be read, or a line is not what it begins as, a JSON string.
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
