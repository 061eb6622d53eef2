"""One sound in an hour of noise: does a model that was trained for it name it, wherever it lies?

    pal demo
    python docs/benchmarks/event.py runs/demo/lal/model --train-minutes 60 --minutes 1 10 60 --tokens-per-position 64

A model of the demo is trained on: the connector, the projectors and the LLM, on clips of 8 seconds up to
`--train-minutes` (drawn evenly in the logarithm), each with one event of 22 kinds in steady noise, at a random time.
Asked are events of another seed in another noise, `--each` in each tenth of the recording. The encoder's features of
the noise are computed once; those of an event replace them where they differ, which is exact, since the encoder is
local in time.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pal
from pal.data.prompts import encode, user_turn
from pal.data.synth.events import KINDS, render
from pal.data.synth.scene import REGISTERS, background
from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.text import exact_match
from pal.files import write_json
from pal.memory import keep_freed_memory
from pal.model import PalModel
from pal.types import Batch, EncodedClip

RATE = 16_000
QUESTION = "What sound is this?"
MARGIN = 2.0
"""Seconds around an event that are encoded with it."""
TENTHS = 10


class Noise:
    """An hour of steady noise and its features."""

    def __init__(self, model: PalModel, minutes: float, seed: int) -> None:
        self.model = model
        part = background(np.random.default_rng(seed), "pink", -55.0, 60 * RATE)
        self.samples_N = torch.from_numpy(np.tile(part, math.ceil(minutes) + 1).astype(np.float32))
        with torch.inference_mode():
            self.x_AE = model.ears.encode_one(self.samples_N).x_AE[0]
        self.hop = round(model.ears.encoder(0).seconds_per_token * RATE)

    def with_event(self, rng: np.random.Generator, seconds: float, share: float | None) -> tuple[EncodedClip, str]:
        """A clip of the noise with one event, and its kind; `share`: where it begins, None: anywhere."""
        kind = str(rng.choice(list(KINDS)))
        low, high = list(REGISTERS.values())[rng.integers(len(REGISTERS))]
        hz = 440.0 * 2 ** ((int(rng.integers(low, high + 1)) - 69) / 12)
        length = min(rng.uniform(KINDS[kind].shortest, KINDS[kind].longest), seconds / 2)
        event_N = render(kind, rng, length, rng.uniform(-26, -14), hz if KINDS[kind].musical else 0.0)
        tokens, around = round(seconds * RATE) // self.hop, round(MARGIN * RATE / self.hop)
        first = around + int(rng.integers(len(self.x_AE) - tokens - 2 * around + 1))
        inside = (rng.random() if share is None else share) * (tokens - len(event_N) // self.hop - 1)
        start = first + int(inside)
        a, b = start - 2 * around, start + len(event_N) // self.hop + 2 * around + 1
        segment_N = self.samples_N[max(0, a) * self.hop : b * self.hop].clone()
        at = (start - max(0, a)) * self.hop
        segment_N[at : at + len(event_N)] += torch.from_numpy(event_N.astype(np.float32))
        with torch.inference_mode():
            changed_AE = self.model.ears.encode_one(segment_N).x_AE[0]
        x_AE = self.x_AE[first : first + tokens].clone()
        # what lies a margin inside of the segment is as in the whole recording
        lo, hi = max(start - around, first), min(b - around, first + tokens)
        x_AE[lo - first : hi - first] = changed_AE[lo - max(0, a) : hi - max(0, a)]
        return EncodedClip((x_AE,), tokens * self.hop / RATE), kind


def train(model: PalModel, noise: Noise, steps: int, minutes: float, batch: int, rate: float) -> list[float]:
    """Train on; the mean loss of each step."""
    model.requires_grad_(False)
    for part in (model.ears.connectors, model.integration, model.llm):
        part.requires_grad_(True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    rng, losses = np.random.default_rng(1), []
    model.train()
    model.ears.encoders.eval()
    for step in tqdm(range(steps), unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        total = 0.0
        for _ in range(batch):
            seconds = float(np.exp(rng.uniform(math.log(8.0), math.log(60 * minutes))))
            clip, kind = noise.with_event(rng, seconds, None)
            talk = [user_turn(QUESTION, 1, model.config.style.after_clip), {"role": "assistant", "content": kind}]
            loss = model.loss(Batch([], [encode(model.tokenizer, talk, [0], train=True)], encoded=[clip]))
            (loss.sum / loss.items / batch).backward()
            total += float(loss.sum) / loss.items / batch
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    model.eval().requires_grad_(False)
    return losses


def accuracy(model: PalModel, noise: Noise, minutes: float, each: int) -> dict[str, object]:
    """Share of events that are named, by tenth of the recording."""
    rng, right = np.random.default_rng(2), []
    began = time.perf_counter()
    for tenth in tqdm(range(TENTHS), unit="tenth", desc=f"{minutes:g} min"):
        for _ in range(each):
            clip, kind = noise.with_event(rng, 60 * minutes, (tenth + rng.random()) / TENTHS)
            right.append(float(exact_match(model.ask(clip, QUESTION, max_new_tokens=8), kind)))
    low, high = bootstrap_ci(right)
    by_tenth = [sum(right[each * t : each * (t + 1)]) / each for t in range(TENTHS)]
    taken = (time.perf_counter() - began) / len(right)
    whole = sum(right) / len(right)
    return {"minutes": minutes, "accuracy": whole, "ci95": [low, high], "by_tenth": by_tenth, "seconds": taken}


def main() -> None:
    """Train and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--train-minutes", type=float, default=60.0, help="longest clip in training")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0, 60.0], help="lengths to ask about")
    parser.add_argument("--each", type=int, default=5, help="events in each tenth of a recording")
    parser.add_argument("--tokens-per-position", type=int, default=1, help="as the option of `lal` and `pal`")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    model = pal.load(args.model)
    if args.tokens_per_position > 1:
        integration = model.integration
        integration.config = integration.config.model_copy(update={"tokens_per_position": args.tokens_per_position})
    longest = max(args.train_minutes, *args.minutes)
    losses = train(model, Noise(model, longest, 1), args.steps, args.train_minutes, args.batch, args.rate)
    tail: list[float] = losses[-20:]
    print(f"loss of the last {len(tail)} steps: {sum(tail) / len(tail):.3f}")
    other = Noise(model, longest, 2)
    found = [accuracy(model, other, minutes, args.each) for minutes in args.minutes]
    print("| minutes | accuracy | 95 % interval | by tenth of the recording | seconds a question |")
    print("|---:|---:|---|---|---:|")
    for row in found:
        low, high = row["ci95"]
        tenths = " ".join(f"{share:.1f}" for share in row["by_tenth"])
        first = f"| {row['minutes']:g} | {row['accuracy']:.2f} | {low:.2f} to {high:.2f} "
        print(f"{first}| {tenths} | {row['seconds']:.1f} |")
    if args.out is not None:
        write_json(args.out, {"arguments": {**vars(args), "out": str(args.out)}, "losses": losses, "rows": found})


if __name__ == "__main__":
    main()
