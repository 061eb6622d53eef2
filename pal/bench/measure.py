"""What a step costs, measured: saved activations, peak memory, time."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds after `forward`, for the backward pass.

    Each storage counts once and in full, however many operations saved a view of it.

    Args:
        forward: makes the loss; it must not run the backward pass.
        weights: parameters and buffers; they are there anyway and do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # keeping the tensor keeps its address from being given to another one
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    del graph
    return sum(tensor.untyped_storage().nbytes() for address, tensor in held.items() if address not in own)


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most tensor memory that `step` holds at once, above what was allocated before it.

    On a GPU from the allocator's counters. On the CPU from the profiler's record of each allocation
    and release; unlike the resident size of the process this neither depends on what earlier steps
    left in the allocator nor counts loaded code.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


def step_seconds(
    steps: Mapping[str, Callable[[], object]], rounds: int = 7, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median seconds of each step. They take turns, so that a busy moment of the machine hits all alike.

    One round before the first is not counted: it pays for what is made once.
    """
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
