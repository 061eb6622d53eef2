"""GPUs to plan for."""

from __future__ import annotations

from dataclasses import dataclass

from pal.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """Data sheet of a GPU: theoretical peaks, without sparsity."""

    name: str
    memory: float
    """Memory in bytes."""
    bf16: float | None
    """FLOP/s of the tensor cores in bfloat16 with float32 accumulation; None without bfloat16."""
    fp32: float
    """FLOP/s in float32, outside of the tensor cores."""
    bandwidth: float
    """Memory bandwidth in bytes a second."""
    link: float
    """Bytes a second that a GPU sends to the others of its machine: half of the bandwidth of its NVLinks, else of PCIe,
    in both directions."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 data sheet, SXM5
        GPU("H100", 80e9, 989e12, 67e12, 3.35e12, 450e9),
        # NVIDIA H200 data sheet, SXM
        GPU("H200", 141e9, 989e12, 67e12, 4.8e12, 450e9),
        # NVIDIA A100 data sheet, SXM4, both sizes
        GPU("A100-80", 80e9, 312e12, 19.5e12, 2.039e12, 300e9),
        GPU("A100-40", 40e9, 312e12, 19.5e12, 1.555e12, 300e9),
        # NVIDIA L40S data sheet
        GPU("L40S", 48e9, 362e12, 91.6e12, 0.864e12, 32e9),
        # NVIDIA Ada architecture white paper, table of the GeForce RTX 4090
        GPU("4090", 24e9, 165.2e12, 82.6e12, 1.008e12, 32e9),
        # NVIDIA T4 data sheet; its tensor cores support float16 only
        GPU("T4", 16e9, None, 8.1e12, 0.32e12, 16e9),
    )
}


def gpu_of(name: str) -> GPU:
    """A GPU by name, in any case. Raises ConfigError that lists the known ones."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ConfigError(f"unknown GPU '{name}'; known: {', '.join(GPUS)}")
