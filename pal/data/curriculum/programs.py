"""The programs and sound fonts of Debian that the curriculum is made with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from pal.errors import ConfigError

PACKAGES = {
    "flite": "flite",
    "espeak-ng": "espeak-ng",
    "fluidsynth": "fluidsynth",
    "/usr/share/sounds/sf2/FluidR3_GM.sf2": "fluid-soundfont-gm",
    "/usr/share/sounds/sf2/TimGM6mb.sf2": "timgm6mb-soundfont",
}
"""Programs and files, and the Debian package of each."""
INSTALL = f"apt-get install {' '.join(PACKAGES.values())}"
TRAINING_FONT, HELD_OUT_FONT = (Path(file) for file in PACKAGES if file.startswith("/"))

_VERSION_COMMANDS = {
    "flite": (["flite", "--version"], r"version: *(\S+)"),
    "espeak-ng": (["espeak-ng", "--version"], r"text-to-speech: *(\S+)"),
    "fluidsynth": (["fluidsynth", "--version"], r"version (\S+)"),
}


def missing_packages() -> list[str]:
    """Debian packages of programs and sound fonts that are not on this machine."""
    return [
        package
        for name, package in PACKAGES.items()
        if (not Path(name).is_file() if name.startswith("/") else shutil.which(name) is None)
    ]


def require() -> None:
    """Raise ConfigError that names the missing packages."""
    missing = missing_packages()
    if missing:
        raise ConfigError(f"programs or sound fonts are missing; install them: apt-get install {' '.join(missing)}")


def versions() -> dict[str, str]:
    """Versions of the programs, and sizes of the sound fonts in bytes."""
    found = {}
    for name, (command, pattern) in _VERSION_COMMANDS.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.search(pattern, done.stdout + done.stderr)
        found[name] = match[1] if match else "unknown"
    return found | {font.name: f"{font.stat().st_size} bytes" for font in (TRAINING_FONT, HELD_OUT_FONT)}


def run(command: list[str]) -> None:
    """Run a program. Raises ConfigError with the last line that it wrote if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        words = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
        why = words[-1][:120] if words else f"status {done.returncode}"
        raise ConfigError(f"{command[0]} failed: {why}; does it run by itself? ({INSTALL})")
