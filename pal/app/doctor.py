"""`pal doctor`: checks of the installation with remedies, without importing torch or transformers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pal import SHIPPED, TEXT_LLM
from pal.errors import BundleError
from pal.files import verify

DISTRIBUTION = "pal-audio"
_FREE_GB = 2.0
"""Disk space of a demo run with its checkpoints and scenes."""
_MEMORY_GB = 3.0
"""Memory for training the small models."""
_REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
_FORMATS = ("WAV", "FLAC", "OGG", "MP3")


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    """Command or action that fixes the fault; empty without a fault."""
    required: bool = True
    """True if training, evaluating and answering fail without it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return asdict(self)


def examine() -> list[Diagnosis]:
    """Run all checks, in the order in which faults should be fixed."""
    diagnoses = [_python(), *_packages(), _codecs(), _gpu(), _machine(), _disk()]
    return [*diagnoses, _shipped("shipped model", SHIPPED), _shipped("its text-only LLM", TEXT_LLM)]


def report(diagnoses: list[Diagnosis]) -> str:
    """The results as lines of text, each fault with its remedy below it."""
    lines = []
    for diagnosis in diagnoses:
        mark = "ok  " if diagnosis.ok else ("FAIL" if diagnosis.required else "no  ")
        lines.append(f"{mark}  {diagnosis.name}: {diagnosis.detail}")
        if diagnosis.remedy:
            lines.append(f"      remedy: {diagnosis.remedy}")
    faults = sum(d.required and not d.ok for d in diagnoses)
    lines.append("all required parts work" if not faults else f"faults to fix: {faults}")
    return "\n".join(lines)


def _python() -> Diagnosis:
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    version = platform.python_version()
    if satisfies(version, SpecifierSet(wanted)):
        return Diagnosis("python", True, version)
    return Diagnosis("python", False, f"{version}, wanted {wanted}", f"make the environment with python {wanted}")


def _packages() -> Iterator[Diagnosis]:
    """Check each requirement of the package's metadata, the only place that states version ranges."""
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        extra = _extra_of(wanted, extras)
        if extra is None or extra in ("test", "web", "dev"):
            continue
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            missing = f"not installed (wanted {wanted.specifier})"
            yield Diagnosis(wanted.name, False, missing, remedy, required=not extra)
            continue
        fits = satisfies(version, wanted.specifier)
        detail = version if fits else f"{version}, wanted {wanted.specifier}"
        yield Diagnosis(wanted.name, fits, detail, "" if fits else remedy, required=not extra)


def _extra_of(wanted: Requirement, extras: list[str]) -> str | None:
    """The extra that asks for a requirement, "" for one of the core, None for one of another platform."""
    if wanted.marker is None:
        return ""
    return next((extra for extra in ("", *extras) if wanted.marker.evaluate({"extra": extra})), None)


def satisfies(version: str, wanted: SpecifierSet) -> bool:
    """True if an installed version, which may be a pre-release, lies in a range such as ">=5.17,<6"."""
    return wanted.contains(version, prereleases=True)


def _codecs() -> Diagnosis:
    remedy = "pip install --upgrade --force-reinstall soundfile"
    try:
        import soundfile
    except (ImportError, OSError) as error:
        return Diagnosis("audio formats", False, f"soundfile does not load: {error}", remedy)
    known = soundfile.available_formats()
    missing = [name for name in _FORMATS if name not in known]
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        missing.append("OPUS")
    if missing:
        return Diagnosis("audio formats", False, f"libsndfile lacks {', '.join(missing)}", remedy)
    more = ", m4a, webm" if find_spec("av") else ""
    detail = f"WAV, FLAC, MP3, OGG, Opus{more} (libsndfile {soundfile.__libsndfile_version__})"
    return Diagnosis("audio formats", True, detail)


def _gpu() -> Diagnosis:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Diagnosis("gpu", True, "Apple silicon", required=False)
    driver = Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None
    build = _torch_cuda()
    if driver and build is None:
        remedy = "install a CUDA build of torch: see https://pytorch.org/get-started/locally"
        return Diagnosis("gpu", False, "NVIDIA driver found, but torch is built for the CPU only", remedy, False)
    if driver:
        return Diagnosis("gpu", True, f"NVIDIA driver found, torch built for CUDA {build}", required=False)
    return Diagnosis("gpu", True, "none found; the CPU is used", required=False)


def _torch_cuda() -> str | None:
    """CUDA version that torch was built for, read from its version file, since importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    if not version.is_file():
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", version.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else None


def _machine() -> Diagnosis:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{platform.system()} {platform.machine()}, {cores} CPU cores"
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # not on every system
        return Diagnosis("machine", True, detail)
    detail += f", {memory:.1f} GB memory"
    if memory < _MEMORY_GB:
        return Diagnosis(
            "machine",
            False,
            detail,
            f"use a machine with at least {_MEMORY_GB:.0f} GB of memory for training",
            required=False,
        )
    return Diagnosis("machine", True, detail)


def _disk() -> Diagnosis:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    detail = f"{free:.1f} GB free in this folder"
    if free < _FREE_GB:
        return Diagnosis(
            "disk", False, detail, f"free {_FREE_GB:.0f} GB, or give --out on another disk", required=False
        )
    return Diagnosis("disk", True, detail)


def _shipped(name: str, folder: Path) -> Diagnosis:
    """Check the SHA-256 of every file in a folder of the package's data."""
    try:
        digests = verify(folder)
    except BundleError as error:
        return Diagnosis(name, False, str(error), _REINSTALL)
    return Diagnosis(name, True, f"{len(digests)} files, {_megabytes(folder):.1f} MB, all SHA-256 digests correct")


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
