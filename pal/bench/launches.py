"""What a step asks of the host: operations it dispatches, kernels it launches, times it waits for the device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pal.bench.machine import settle
from pal.bench.models import AttachedModel, BenchModel
from pal.bench.place import eager, training
from pal.bench.presets import BenchPoint, Length
from pal.bench.result import where_it_failed
from pal.bench.run import Bench
from pal.bench.scene import BenchScene

_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")
"""Operators whose result the host has to see."""
_WAITED = "called a synchronizing CUDA operation"
"""What torch warns of then; that it watches for it is another warning."""


@dataclass(frozen=True)
class StepCount:
    """One step of a variant on one batch."""

    variant: str
    phase: str
    audio_tokens: Length
    batch: int
    compiled: bool
    operations: int | None = None
    """Dispatched, views left out; None where compiled code hides them."""
    launches: int | None = None
    """Kernels that the host launched; None where there is no GPU."""
    kernel_seconds: float | None = None
    """What they took on the device, one after the other."""
    waits: int | None = None
    """Times the host waited for the device, or would on a GPU."""
    where: tuple[str, ...] = ()
    """In which lines, those with most first."""
    failed: str | None = None

    @property
    def gates(self) -> bool:
        """Whether it must not wait: it is ours, not only compared."""
        return self.variant not in OTHERS

    @property
    def ok(self) -> bool:
        """Whether it ran, and without waiting where it must not."""
        return self.failed is None and (self.waits == 0 or not self.gates)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}


OTHERS = ("plain", "plain_text", "qwen2audio", "mllama")
"""Variants that are not ours."""


def count_steps(
    bench: Bench,
    subjects: list[BenchModel],
    places: list[BenchPoint],
    in_time: Callable[[], bool] = lambda: True,
    done: Callable[[StepCount], object] = lambda found: None,
) -> tuple[list[StepCount], int]:
    """Each variant's step as it is and, where the run compiles it, compiled; and how many there was no time for.

    Args:
        bench: the run.
        subjects: its variants.
        places: phases `train` and `decode`.
        in_time: asked before each step.
        done: called with each result.
    """
    found: list[StepCount] = []
    todo = [
        (place, subject, compiled)
        for place in places
        for subject in subjects
        for compiled in ((False, True) if bench.preset.compiled and place.phase == "train" else (False,))
    ]
    for place, subject, compiled in todo:
        if not in_time():
            break
        scene = bench.scene(place, None)
        about = (subject.name, place.phase, place.length, place.batch, compiled)
        try:
            one = _count(bench, subject, scene, StepCount(*about))
        except Exception as error:
            one = StepCount(*about, failed=where_it_failed(error))
        bench.tidy(always=one.failed is not None)
        found.append(one)
        done(one)
    return found, len(todo) - len(found)


def _count(bench: Bench, subject: BenchModel, scene: BenchScene, about: StepCount) -> StepCount:
    with nullcontext() if about.compiled else eager(), _step(bench, subject, scene, about.phase) as step:
        for _ in range(2):  # what is made once
            step()
        settle(bench.device)
        # without a GPU operations are looked at one by one, which nothing compiled allows
        places = [] if about.compiled and bench.device.type != "cuda" else waits(step, bench.device)
        counted, seconds = launches(step, bench.device)
        operations = None
        if not about.compiled:
            with Dispatched() as dispatched:
                step()
            operations = dispatched.operations
    where = tuple(f"{place} ({n})" for place, n in Counter(places).most_common(5))
    made = asdict(about) | {"operations": operations, "launches": counted, "kernel_seconds": seconds}
    return StepCount(**{**made, "waits": len(places), "where": where})


@contextmanager
def _step(bench: Bench, subject: BenchModel, scene: BenchScene, phase: str) -> Iterator[Callable[[], object]]:
    if phase == "decode":
        with torch.inference_mode():
            reading = subject.read(scene, 16) if isinstance(subject, AttachedModel) else subject.read(scene)
            yield lambda: subject.write(reading, 1)
        return
    with training(subject, bench.preset.train):
        # a rate of 0 does all the work of an update and leaves the weights alone
        optimizer = torch.optim.AdamW(subject.trained(bench.preset.train), lr=0.0, fused=True)

        def step() -> None:
            subject.loss(scene).backward()
            optimizer.step()
            optimizer.zero_grad()

        yield step


class Dispatched(TorchDispatchMode):
    """Counts operations, views left out, and those whose result the host has to see, with the lines that ask."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "is_view", False):
            self.operations += 1
        if str(func._overloadpacket) in _READS:
            self.reads.append(_line())
        return func(*args, **(kwargs or {}))


def waits(step: Callable[[], object], device: torch.device) -> list[str]:
    """The lines in which a step waits for the device, or asks for what a GPU's host would have to wait for."""
    if device.type != "cuda":
        with Dispatched() as dispatched:
            step()
        return dispatched.reads
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if _WAITED in str(w.message)]


def launches(step: Callable[[], object], device: torch.device) -> tuple[int | None, float | None]:
    """Kernels that a step launches, and the seconds they take; None where there is no GPU."""
    if device.type != "cuda":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        settle(device)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    launched = sum(event.name().startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in events)
    on_device = torch.autograd.DeviceType.CUDA
    taken = sum(event.duration_ns() for event in events if event.device_type() == on_device)
    return launched, taken / 1e9


def _line() -> str:
    own = [frame for frame in traceback.extract_stack() if "/pal/" in frame.filename]
    frames = [frame for frame in own if frame.filename != __file__]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
