"""A training step of each integration on real components, beside PLITS'.

    python docs/benchmarks/real_step.py --json

Eight clips of five seconds, whose features are there already, one short question and answer each. Trained are LoRA on
the LLM's attention, the connector and the projectors, in float32, with AdamW. SmolLM2-135M-Instruct and Whisper
tiny.en, at 50 tokens a second (`mlp`) and at 12.5 (`strided_conv`). Median of the steps after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from tqdm import tqdm

import pal
from pal.backbone.finetuning import LoRA
from pal.data.prompts import encode, user_turn
from pal.memory import keep_freed_memory
from pal.types import Batch

VARIANTS: dict[str, dict[str, object]] = {
    "PLITS": {"name": "plits"},
    "LAL": {"name": "lal"},
    "LAL, first third": {"name": "lal", "layers": "first_third"},
    "PAL": {"name": "pal"},
    "LAL, narrow projectors": {"name": "lal", "hidden": 128},
}
CONNECTORS: dict[str, dict[str, object]] = {
    "50": {"name": "mlp"},
    "12.5": {"name": "strided_conv", "stride": 4},
}
CLIPS = 8
SECONDS = 5.0


def measure(integration: dict[str, object], connector: dict[str, object], steps: int) -> float:
    """Median seconds of a step."""
    torch.manual_seed(0)
    model = pal.attach(
        llm="smollm2-135m-instruct",
        encoders=[{"name": "whisper", "path": "whisper-tiny.en", "window_seconds": 10}],
        connector=connector,
        integration=integration,
    )
    model.requires_grad_(False)
    model.llm.add_lora(LoRA(r=8, targets=["q_proj", "k_proj", "v_proj", "o_proj"]))
    for part in (model.ears.connectors, model.integration):
        part.requires_grad_(True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    talk = [user_turn("What can be heard here?", 1), {"role": "assistant", "content": "a dog barks twice"}]
    clip = model.ears.encode_one(torch.randn(round(SECONDS * model.sampling_rate)))
    rows = [encode(model.tokenizer, talk, [i], train=True) for i in range(CLIPS)]
    taken = []
    for _ in range(steps + 1):
        batch = Batch([], rows, encoded=[clip] * CLIPS)
        began = time.perf_counter()
        model.train()
        loss = model.loss(batch)
        (loss.sum / loss.items).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    """One row for each integration and rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    found: dict[str, dict[str, float]] = {}
    for rate, connector in CONNECTORS.items():
        found[rate] = {name: measure(VARIANTS[name], connector, args.steps) for name in tqdm(args.only, desc=rate)}
    if args.json:
        print(json.dumps(found))
        return
    print("| tokens a second | integration | step, s | PLITS' speed, times |")
    print("|---:|---|---:|---:|")
    for rate, times in found.items():
        for name, seconds in times.items():
            ratio = times["PLITS"] / seconds if "PLITS" in times else float("nan")
            print(f"| {rate} | {name} | {seconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
