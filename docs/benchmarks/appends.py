"""What an append to a stream costs as the stream grows: ten minutes in chunks of half a second.

    python docs/benchmarks/appends.py

Medians of the appends of the second minute and of the last one, of the model `tiny` and of the same with a causal
encoder, whose weights are those of `tiny` but not trained for it: the work is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import pal
from pal.encoders.tiny import Tiny
from pal.model import PalModel

CHUNK = 0.5


def causal(model: PalModel) -> PalModel:
    """The model with a causal encoder."""
    encoder = Tiny(model.ears.encoder(0).config.model_copy(update={"causal": True}))
    encoder.load_state_dict(model.ears.encoder(0).state_dict())
    model.ears.encoders[0] = encoder.eval().requires_grad_(False)
    return model


def main() -> None:
    """Two rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10)
    minutes = parser.parse_args().minutes
    print("| encoder | append in minute 2, ms | in the last minute | ratio |\n|---|---:|---:|---:|")
    for name, model in (("tiny", pal.load("tiny")), ("tiny, causal", causal(pal.load("tiny")))):
        generator, taken = torch.Generator().manual_seed(0), []
        live = model.listen()
        for _ in range(round(minutes * 60 / CHUNK)):
            chunk_N = 0.05 * torch.randn(round(CHUNK * model.sampling_rate), generator=generator)
            began = time.perf_counter()
            live.append(chunk_N)
            taken.append(time.perf_counter() - began)
        each = round(60 / CHUNK)
        second, last = (1000 * statistics.median(part) for part in (taken[each : 2 * each], taken[-each:]))
        print(f"| {name} | {second:.1f} | {last:.1f} | {last / second:.2f} |")


if __name__ == "__main__":
    main()
