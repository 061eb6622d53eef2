"""`FolderIndex`: the clips of a folder, prepared once, to be asked any number of questions.

NAME.palidx/
    index.json               format, what is stored of each clip, and of which model
    3f/3f8a....safetensors   one clip, named by the SHA-256 of its path in the folder: audio keys and values
                             (`AudioKV`), the same in int8, or encoder features; with path, size, time and SHA-256 of
                             the audio file

Each clip is one file, written atomically, so an interrupted index goes on where it stopped, and a clip is prepared
again only if its audio file changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open

from pal import long_clips
from pal.backbone.audio_kv import AudioKV
from pal.clips import clip_notes, read_waveform
from pal.conversations import read_question
from pal.data.tables import SUFFIXES, is_metadata
from pal.digest import digest
from pal.errors import AudioError, BundleError
from pal.files import remove_unfinished, sha256, write_json, write_tensors
from pal.types import EncodedClip

if TYPE_CHECKING:
    from pal.model import PalModel

Store = Literal["kv", "int8", "features"]
"""What is stored of a clip: audio keys and values, the same in int8, or the features of the encoders, from which keys
and values are made when the clip is asked."""

STORES: tuple[Store, ...] = get_args(Store)
SUFFIX = ".palidx"
BATCH_SECONDS = 1800.0
"""Most audio that is asked at once."""
_FORMAT = "pal-folder-index-1"
_ABOUT = "index.json"


@dataclass(frozen=True)
class ClipSource:
    """Audio file of a clip."""

    path: str
    """In the indexed folder."""
    size: int
    changed: int
    """Time of its last change, in nanoseconds."""
    sha256: str


@dataclass(frozen=True)
class StoredClip:
    """Entry of a `FolderIndex`."""

    source: ClipSource
    file: Path
    seconds: float


@dataclass
class IndexReport:
    """What `FolderIndex.update` did."""

    added: int = 0
    unchanged: int = 0
    removed: int = 0
    """Entries whose audio file is gone."""
    failed: dict[str, str] = field(default_factory=dict)
    """Audio files that could not be read, and why; they have no entry."""
    notes: list[str] = field(default_factory=list)
    passed_over: int = 0
    """Files whose names do not end as those of audio files do."""


@dataclass(frozen=True)
class StoredSizes:
    """Bytes of one clip in each form."""

    kv: int
    int8: int
    features: int

    @classmethod
    def of_seconds(cls, model: PalModel, seconds: float) -> StoredSizes:
        """The sizes of a clip of some seconds."""
        clip = model.ears.encode_one(torch.zeros(round(seconds * model.sampling_rate)))
        made = model.index(clip)
        return cls(made.nbytes, made.quantized().nbytes, sum(x_AE.nbytes for x_AE in clip.x_AE))


class FolderIndex:
    """The stored clips of a folder.

    Args:
        path: the index, a folder that ends in .palidx.

    Raises:
        BundleError: the folder is no index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        about = _about_index(path)
        self.store: Store = about["store"]
        self.digest: str = about["digest"]
        """Of the model, or of its encoders where features are stored."""

    @classmethod
    def open(cls, path: Path, model: PalModel, store: Store | None = None) -> FolderIndex:
        """The index at a path, made if there is none; `store` None is that of the index, or "kv".

        Raises:
            BundleError: another kind of folder, or an index of another model or another form.
        """
        if not path.exists() or (path.is_dir() and not any(path.glob("[!.]*"))):
            about = {"format": _FORMAT, "store": store or "kv", "digest": _digest(model, store or "kv")}
            write_json(path / _ABOUT, about)
        found = cls(path)
        if store is not None and found.store != store:
            raise BundleError(f"{path}: stores {found.store}, not {store}; give another path, or delete it")
        found.check(model)
        return found

    def check(self, model: PalModel) -> None:
        """Raise BundleError if another model made it."""
        if self.digest != _digest(model, self.store):
            what = "a model of other encoders" if self.store == "features" else "another model"
            raise BundleError(
                f"{self.path}: was made by {what}; ask that one (--model), or index the folder again under another path"
            )

    def clips(self) -> list[StoredClip]:
        """All entries, by path."""
        found = [self._entry(file) for file in sorted(self.path.glob("??/*.safetensors"))]
        return sorted(found, key=lambda clip: clip.source.path)

    def update(
        self,
        folder: Path,
        model: PalModel,
        read_to_end: bool = False,
        progress: Callable[[list[Path]], Iterator[Path]] = iter,
    ) -> IndexReport:
        """Prepare the clips of a folder and of those below it; only what is new or changed.

        Args:
            folder: of audio files.
            model: that the index was opened with.
            read_to_end: as in `PalModel.ask`.
            progress: wraps the audio files in a progress bar.

        Raises:
            BundleError: no clip of the index is in the folder, so it is of another one, whose clips would be removed.
        """
        paths, report = audio_files(folder)
        before = {clip.source.path: clip for clip in self.clips()}
        names = {path: path.relative_to(folder).as_posix() for path in paths}
        if before and not before.keys() & set(names.values()):
            raise BundleError(
                f"{self.path}: none of its {len(before)} clips is in {folder}; give the folder that it was made of; if "
                "this is it, and all its files are others now, delete the index or give another path"
            )
        remove_unfinished(self.path)
        for path in progress(paths):
            old = before.pop(names[path], None)
            try:
                source = _source(path, names[path], None if old is None else old.source)
            except OSError as error:  # what is stored is still true of what was there
                report.failed[names[path]] = _unreadable(path, error)
                continue
            if old is not None and old.source.sha256 == source.sha256:
                report.unchanged += 1
                continue
            try:
                report.notes += self._add(path, source, model, read_to_end)
                report.added += 1
            except AudioError as error:
                report.failed[names[path]] = str(error)
                if old is not None:
                    old.file.unlink()
        for name, gone in before.items():
            if not any(name.startswith(f"{unread}/") for unread in report.failed):
                gone.file.unlink()
                report.removed += 1
        return report

    def load(self, clip: StoredClip) -> AudioKV | EncodedClip:
        """Read a clip; raises BundleError if its file is damaged or of another index."""
        if self.store != "features":
            try:
                return AudioKV.load(clip.file, self.digest)
            except BundleError as error:
                what = str(error).split(";")[0]
                raise BundleError(f"{what}; delete it, and index the folder again") from None
        about, tensors = _read(clip.file)
        if about.get("digest") != self.digest:
            raise BundleError(f"{clip.file}: was made by other encoders; delete it, and index the folder again")
        return EncodedClip(tuple(tensors[str(i)] for i in range(len(tensors))), about["seconds"])

    def ask(
        self,
        model: PalModel,
        question: str,
        batch: int = 8,
        progress: Callable[[list[StoredClip]], Iterator[StoredClip]] = iter,
        **options: Any,
    ) -> dict[str, str]:
        """Ask every clip the same question: path -> answer, by path.

        Args:
            model: that made the index.
            question: about one clip.
            batch: most clips in one batch; clips of similar length share one, of at most `BATCH_SECONDS` together.
            progress: wraps the clips in a progress bar.
            options: transformers' generation options, such as `max_new_tokens`.
        """
        self.check(model)
        (asked,) = read_question(question, 1, model.tokenizer, model.config.style).tokens
        found: dict[str, str] = {}
        waiting: list[tuple[str, AudioKV | EncodedClip]] = []
        clips = sorted(self.clips(), key=lambda clip: clip.seconds)
        for number, clip in enumerate(progress(clips)):
            waiting.append((clip.source.path, self.load(clip)))
            following = clips[number + 1].seconds if number + 1 < len(clips) else BATCH_SECONDS
            # all are padded to the longest, which is the next one
            if len(waiting) == batch or (len(waiting) + 1) * following > BATCH_SECONDS:
                rows = [replace(asked, clips=[at] * len(asked.clips)) for at in range(len(waiting))]
                texts = model.generate([one for _, one in waiting], rows, **options)
                found |= dict(zip((name for name, _ in waiting), texts, strict=True))
                waiting = []
        return dict(sorted(found.items()))

    def _add(self, path: Path, source: ClipSource, model: PalModel, read_to_end: bool) -> list[str]:
        """Prepare one clip; notes on its length."""
        file = self._file(source.path)
        file.parent.mkdir(exist_ok=True)
        about = asdict(source)
        if self.store == "features":
            wave = read_waveform(path, model.sampling_rate, read_to_end=read_to_end)
            encoded = model.encode_clip(wave)
            _write(file, encoded, {"digest": self.digest, "seconds": encoded.seconds, "source": about})
            return list(clip_notes([wave]))
        made, notes = long_clips.index(model, path, read_to_end=read_to_end, int8=self.store == "int8")
        made.save(file, source=about)
        return list(notes)

    def _file(self, name: str) -> Path:
        key = hashlib.sha256(os.fsencode(name)).hexdigest()
        return self.path / key[:2] / f"{key}.safetensors"

    def _entry(self, file: Path) -> StoredClip:
        about = _about(file)
        try:
            source = ClipSource(**about["source"])
            seconds = about["seconds"] if self.store == "features" else sum(about["durations"])
        except (KeyError, TypeError):
            raise BundleError(f"{file}: is no clip of this index; delete it, and index the folder again") from None
        if self._file(source.path) != file:
            raise BundleError(f"{file}: is the clip '{source.path}' under another name; delete it, and index again")
        return StoredClip(source, file, seconds)


def _digest(model: PalModel, store: Store) -> str:
    """SHA-256 of what a stored clip depends on."""
    if store != "features":
        return model.digest
    encoders = [model.ears.encoder(i) for i in range(len(model.ears.encoders))]
    options = [one.standalone_config().model_dump(mode="json", exclude={"path", "revision"}) for one in encoders]
    return digest(model.ears.encoders.state_dict(), json.dumps(options, sort_keys=True))


def audio_files(folder: Path) -> tuple[list[Path], IndexReport]:
    """Audio files in a folder and those below it, sorted, and a report with the folders that cannot be listed.

    Links to folders are followed, but for those to a folder that they are in. Indexes are left out.
    """
    unread: list[OSError] = []
    found: list[Path] = []
    report = IndexReport()
    for where, folders, files in os.walk(folder, onerror=unread.append, followlinks=True):
        here = Path(where)
        round_again = [name for name in folders if here.resolve().is_relative_to((here / name).resolve())]
        folders[:] = [name for name in folders if name not in round_again and not name.endswith(SUFFIX)]
        report.notes += [f"{here / name} is a link to a folder that it is in; not followed" for name in round_again]
        own = [here / name for name in files if not is_metadata((here / name).relative_to(folder))]
        heard = [path for path in own if path.suffix.lower() in SUFFIXES]
        found += heard
        report.passed_over += len(own) - len(heard)
    for error in unread:
        report.failed[Path(error.filename).relative_to(folder).as_posix()] = f"it cannot be listed ({error.strerror})"
    return sorted(found), report


def _unreadable(path: Path, error: OSError) -> str:
    """What is wrong with a file that the system does not open, with the remedy."""
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}, which is not there; mend or remove the link"
    if path.exists() and not path.is_file():
        return "it is no ordinary file; write it to one first"
    remedy = "check its permissions" if isinstance(error, PermissionError) else "check the disk or the network"
    return f"it cannot be read ({error.strerror}); {remedy}"


def _source(path: Path, name: str, old: ClipSource | None) -> ClipSource:
    """The audio file as it is now; it is read only if its size or time has changed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no ordinary file")
    same = old is not None and (old.size, old.changed) == (status.st_size, status.st_mtime_ns)
    content = old.sha256 if old is not None and same else sha256(path)
    return ClipSource(name, status.st_size, status.st_mtime_ns, content)


def _about_index(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise BundleError(f"{path}: there is no such index; make it with: pal index FOLDER --out {path}")
    again = "delete it and index the folder again, or give another path"
    if not (path / _ABOUT).is_file():
        raise BundleError(f"{path}: is no folder index, it has no {_ABOUT}; give another path")
    try:
        about: dict[str, Any] = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        known = about["format"] == _FORMAT
        if known and about["store"] in STORES and isinstance(about["digest"], str):
            return about
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: its {_ABOUT} is incomplete or no JSON; {again}") from None
    what = f"its {_ABOUT} says what no index says" if known else f"its format is {about['format']!r}, not {_FORMAT}"
    raise BundleError(f"{path}: {what}; {again}")


def _about(file: Path) -> dict[str, Any]:
    """Description of a stored clip, without its tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {}).get("about", "{}"))
            return about
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(
            f"{file}: is no stored clip ({str(error).splitlines()[0]}); delete it and index again"
        ) from None


def _write(file: Path, clip: EncodedClip, about: dict[str, Any]) -> None:
    tensors = {str(i): x_AE.cpu().contiguous() for i, x_AE in enumerate(clip.x_AE)}
    text = json.dumps(about)
    write_tensors(file, tensors, {"about": text, "sha256": digest(tensors, text)})


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    about = _about(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if digest(tensors, metadata.get("about", "")) != metadata.get("sha256"):
        raise BundleError(f"{file}: is damaged, its content does not match its digest; delete it and index again")
    return about, tensors


def describe(report: IndexReport, clips: Sequence[StoredClip]) -> str:
    """One line on an index."""
    seconds, size = sum(clip.seconds for clip in clips), sum(clip.file.stat().st_size for clip in clips)
    done = f"{report.added} added, {report.unchanged} unchanged"
    done += f", {report.removed} removed" if report.removed else ""
    done += f", {len(report.failed)} failed" if report.failed else ""
    others = f"{report.passed_over} other file{'s' * (report.passed_over != 1)} passed over"
    done += f", {others}" if report.passed_over else ""
    return f"{len(clips)} clips ({done}), {seconds / 60:.1f} minutes of audio, {size:,} bytes"
