"""Machine of a run: its name, versions, and the speed of its matrix products."""

from __future__ import annotations

import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import pal
from pal.bench.presets import Preset
from pal.errors import PalError


def check_device(preset: Preset) -> None:
    """Raises PalError where the preset's device is not there."""
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise PalError(
            f"preset '{preset.name}' needs a CUDA GPU and torch {torch.__version__} sees none here; "
            "use --preset cpu, or run it where there is one"
        )


def machine(preset: Preset) -> dict[str, Any]:
    """Facts about the machine, versions, and the preset."""
    kept = ("name", "shape", "dtype", "train", "repeats", "decode_tokens", "compiled")
    measured = {("preset" if key == "name" else key): getattr(preset, key) for key in kept}
    return {**machine_facts(preset.device), **measured, "projector_width": preset.width}


def machine_facts(device: str) -> dict[str, Any]:
    """Facts about the machine, and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _cpu() if device == "cpu" else torch.cuda.get_device_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pal": pal.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def product_rate(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """FLOP/s of one product of random square matrices: 8192 wide on a GPU, 1024 on a CPU.

    Random, since zeros take less power and so run faster.
    """
    width = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, generator=generator, device=device, dtype=dtype) for _ in range(2))
    found = []
    for _ in range(3 + rounds):
        settle(device)
        started = time.perf_counter()
        a @ b
        settle(device)
        found.append(time.perf_counter() - started)
    return 2 * width**3 / statistics.median(found[3:])


def settle(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
