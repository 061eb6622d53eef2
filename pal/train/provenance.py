"""`provenance.json`: with what a run was started, and each time it was resumed.

It is written before the first step, so that a run that never ends has it, too.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal import bundle, pretrained
from pal.digest import digest
from pal.files import MANIFEST, sha256, write_json
from pal.train.recipe import Recipe

if TYPE_CHECKING:
    from pal.model import PalModel

FILE = "provenance.json"
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")
_SECONDS = 10


def record(
    out: Path, recipe: Recipe, data: dict[str, str], step: int, model: PalModel, device: str, processes: int
) -> float:
    """Add a start to the file; returns the time of the first one, in seconds since the epoch.

    Args:
        out: folder of the run.
        recipe: with all defaults and overrides.
        data: digest of each source.
        step: completed steps.
        model: before its first step; digests of its weights are made at the first start alone.
        device: that trains.
        processes: number of them.
    """
    starts = [] if step == 0 else read(out)
    start: dict[str, Any] = {
        "time": time.time(),
        "step": step,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "revision": revision(),
        "versions": versions(),
        "data": data,
        "device": device,
        "processes": processes,
    }
    if not starts:
        start["models"] = {"sources": sources(recipe), "weights": weights(model)}
    write_json(out / FILE, {"starts": [*starts, start]})
    first: float = (starts or [start])[0]["time"]
    return first


def read(out: Path) -> list[dict[str, Any]]:
    """All starts of a run; none where the file is missing or is of another kind."""
    try:
        starts = json.loads((out / FILE).read_text(encoding="utf-8"))["starts"]
        return [start for start in starts if isinstance(start["time"], float)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@cache
def revision() -> dict[str, Any] | None:
    """Commit of the git checkout that `pal` runs from, and whether files were changed since; None without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS
            ).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": bool(changes.strip())}


def versions() -> dict[str, str]:
    """Version of pal, of Python and of the libraries that decide what is computed."""
    import pal

    found = {"pal": pal.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def sources(recipe: Recipe) -> list[dict[str, Any]]:
    """Where the weights come from.

    Bundles have the SHA-256 of their manifest, pretrained models known by name that of the published file.
    """
    found: list[dict[str, Any]] = []
    bundles: list[tuple[str, Path]] = [] if recipe.bundle is None else [("model", recipe.bundle)]
    for part, path in [*bundles, *recipe.start.items()]:
        manifest = bundle.find(path) / MANIFEST
        found.append({"part": part, "source": str(path), "manifest_sha256": sha256(manifest)})
    if recipe.model is None:
        return found
    llm = recipe.model.llm
    named = [("llm", llm.path, llm.revision)]
    for i, encoder in enumerate(recipe.model.encoders):
        named.append((f"encoder {i}", encoder.get("path"), encoder.get("revision")))
    for part, source, at in named:
        if source is not None:
            known = pretrained.KNOWN.get(str(source))
            one = {"part": part, "source": str(source), "revision": at}
            found.append(one if known is None else {**one, "package": known.package, "file_sha256": known.sha256})
    return found


def weights(model: PalModel) -> dict[str, str]:
    """SHA-256 of the weights of each part before training."""
    return {name: digest(part.state_dict()) for name, part in model.parts().items()}
