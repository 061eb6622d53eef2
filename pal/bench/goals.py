"""Goals of this project for the presets `cpu` and `gpu-quick`, scope `llm`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pal.bench.presets import Length

Quantity = Literal["seconds", "saved_bytes", "flops", "kv_bytes", "rate"]
RATE = "product"
"""Reference of a `rate` in FLOP/s: one large matrix product on the same device."""


@dataclass(frozen=True)
class Goal:
    """Bound on the ratio of a variant's number to a reference."""

    variant: str
    against: str
    phase: str
    quantity: Quantity
    lengths: tuple[Length, ...] | None = None
    """Audio tokens of a clip for which it holds; None for all."""
    speed: float | None = None
    """Least number of times faster."""
    share: float | None = None
    """Largest ratio."""
    least: float | None = None
    """Smallest ratio."""
    batch: int = 1
    against_phase: str | None = None
    """Phase of the reference, where it is another one."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest ratio of value to reference."""
        return self.least, self.share if self.speed is None else 1 / self.speed


GOALS = (
    Goal("lal", "plits", "train", "seconds", (750,), speed=3.4),
    Goal("lal", "plits", "train", "seconds", (1500,), speed=4.5),
    Goal("lal", "plits", "train", "saved_bytes", (750,), share=0.20),
    Goal("lal", "plits", "train", "saved_bytes", (1500,), share=0.12),
    Goal("lal_third", "plits", "train", "seconds", (750,), speed=4.0),
    Goal("lal_third", "plits", "train", "seconds", (1500,), speed=6.0),
    Goal("pal", "plits", "train", "seconds", (750,), speed=2.0),
    Goal("pal", "plits", "train", "seconds", (1500,), speed=2.1),
    Goal("pal", "plits", "train", "saved_bytes", (750,), share=0.55),
    Goal("pal", "plits", "train", "saved_bytes", (1500,), share=0.50),
    Goal("lal", "plits", "decode", "seconds", share=1.10),
    Goal("lal_third", "plits", "decode", "seconds", (1500, 7500, 15000), speed=1.0),
    Goal("lal", "qwen2audio", "prefill", "seconds", (750,), speed=3.0),
    Goal("lal", "mllama", "prefill", "seconds", (750,), share=1.15),
)
"""Goals of `cpu`: batch 1, float32."""


def _gpu() -> Iterator[Goal]:
    training: dict[str, dict[Length, float]] = {
        "lal": {750: 2.5, 1500: 4.5, "ragged": 3.0},
        "lal_third": {750: 3.0, 1500: 6.0, "ragged": 4.0},
        "pal": {750: 1.6, 1500: 2.0, "ragged": 1.8},
    }
    for variant, speeds in training.items():
        for length, speed in speeds.items():
            yield Goal(variant, "plits", "train", "seconds", (length,), speed=speed, batch=8)
    saved: dict[str, dict[Length, float]] = {"lal": {750: 0.20, 1500: 0.12}, "pal": {750: 0.50, 1500: 0.45}}
    for variant, shares in saved.items():
        for length, share in shares.items():
            yield Goal(variant, "plits", "train", "saved_bytes", (length,), share=share, batch=8)
        for length, speed in {750: 1.0, 1500: 1.3}.items():
            yield Goal(variant, "plits", "prefill", "seconds", (length,), speed=speed, batch=1)
    yield Goal("plits", "plain", "train", "seconds", (750, 1500), share=1.03, batch=8)
    for variant, least in {"plits": 0.45, "lal": 0.35}.items():
        yield Goal(variant, RATE, "train", "rate", (750, 1500), least=least, batch=8)
    for variant in ("text", "plits", "lal", "lal_third", "pal", "flamingo"):
        plain = "plain_text" if variant == "text" else "plain"
        yield Goal(variant, plain, "decode", "seconds", share=1.10, batch=8)
        for batch in (1, 8):
            yield Goal(variant, plain, "prefill", "seconds", share=1.10, batch=batch)
        yield Goal(variant, plain, "decode_graph", "seconds", (750, 1500), speed=4.0, batch=8, against_phase="decode")


GPU_GOALS = tuple(_gpu())
"""Goals of `gpu-quick`: bfloat16, batch 8, or 1 in prefill of a single question."""

BY_PRESET = {"cpu": GOALS, "gpu-quick": GPU_GOALS}
