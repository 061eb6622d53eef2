"""Backward pass of torch's attention on a CPU, in bfloat16 and in float32.

    python docs/benchmarks/cpu_attention.py

Milliseconds of forward and backward pass of causal attention with 9 heads and 3 key/value heads of 64, as in
SmolLM2-135M, for batches as they occur in training. The median of `--repeat` calls after three that do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

SHAPES = {"16 rows of 93": (16, 93), "16 rows of 52": (16, 52), "2 rows of 512": (2, 512)}
DTYPES = (torch.bfloat16, torch.float32)


def measure(rows: int, length: int, dtype: torch.dtype, repeat: int) -> tuple[float, float]:
    """Median milliseconds of the forward and of the backward pass."""
    forward, backward = [], []
    for _ in range(repeat + 3):
        q, k, v = (torch.randn(rows, n, length, 64, dtype=dtype, requires_grad=True) for n in (9, 3, 3))
        began = time.perf_counter()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        between = time.perf_counter()
        out.backward(torch.ones_like(out))
        forward.append(between - began)
        backward.append(time.perf_counter() - between)
    return statistics.median(forward[3:]) * 1000, statistics.median(backward[3:]) * 1000


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    print("| shape | dtype | forward, ms | backward, ms |")
    print("|---|---|---:|---:|")
    for name, (rows, length) in SHAPES.items():
        for dtype in DTYPES:
            forward, backward = measure(rows, length, dtype, args.repeat)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {forward:.1f} | {backward:.1f} |")


if __name__ == "__main__":
    main()
