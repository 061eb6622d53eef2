"""Time and memory of a long clip with the model `tiny`: indexed, then asked one question.

    python docs/benchmarks/hours.py --hours 1

The clip is noise, whose samples are in memory from the start (0.23 GB an hour).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import pal


def peak() -> float:
    """Largest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Index and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    hours = parser.parse_args().hours
    model = pal.load("tiny")
    noise_N = torch.randn(round(hours * 3600 * model.sampling_rate), generator=torch.Generator().manual_seed(0))
    clip = (noise_N.mul_(0.05).numpy(), model.sampling_rate)
    print(f"the model and the samples: {peak():.2f} GiB")
    began = time.perf_counter()
    made = model.index(clip)
    print(f"indexed in {time.perf_counter() - began:.0f} s: {made}, {peak():.2f} GiB at most")
    began = time.perf_counter()
    model.ask(made, "What sound is this?", max_new_tokens=8)
    print(f"asked in {time.perf_counter() - began:.0f} s, {peak():.2f} GiB at most")


if __name__ == "__main__":
    main()
