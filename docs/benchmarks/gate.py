"""Does a gate help LAL to learn? First steps of training on real components, for several seeds.

    python docs/benchmarks/gate.py --esc10 ../shared/audio/esc10 --fsdd ../shared/audio/fsdd --out runs/gate

SmolLM2-135M-Instruct is frozen; strided convolution and projectors learn from 240 clips of ESC-10 (folds 1 to 3)
and 200 spoken digits, eight clips a step. Held out: 48 clips of fold 4, and 48 digits of the speaker theo. One line of
JSON a run: loss a token of the held-out answers before, in the middle and at the end.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import pal
from pal.data.manifest import Record
from pal.data.prepare import read
from pal.data.prompts import conversation_of, encode
from pal.memory import keep_freed_memory
from pal.model import PalModel
from pal.types import Batch, EncodedClip

SHARED = {"positions": "shared"}
VARIANTS: dict[str, dict[str, object]] = {
    "LAL": {"name": "lal"},
    "LAL, shared positions": {"name": "lal", **SHARED},
    "LAL, bias -8 alone, shared positions": {"name": "lal", "gate": -8, "key_scale": 1.0, **SHARED},
    "LAL, bias -16 alone, shared positions": {"name": "lal", "gate": -16, "key_scale": 1.0, **SHARED},
    "LAL, bias -32 alone, shared positions": {"name": "lal", "gate": -32, "key_scale": 1.0, **SHARED},
    "LAL, gate, shared positions": {"name": "lal", "gate": -16, **SHARED},
    "first third": {"name": "lal", "layers": "first_third"},
    "first third, gate, shared positions": {"name": "lal", "layers": "first_third", "gate": -16, **SHARED},
    "PLITS": {"name": "plits"},
}
LR = 1e-3
WARMUP = 10


def is_held_out(record: Record) -> bool:
    """Fold 4 of ESC-10, speaker theo of FSDD."""
    name = Path(record.clips[0]).name
    return "_theo_" in name if record.dataset == "fsdd" else name.startswith("4-")


def chosen(esc10: Path, fsdd: Path) -> list[Record]:
    """Records for training and evaluation; the same for all runs."""
    records = [*read("esc50", esc10, paraphrase=True), *read("fsdd", fsdd, paraphrase=True)]
    random.Random(0).shuffle(records)
    found: list[Record] = []
    for held_out, digits, most in ((False, False, 240), (False, True, 200), (True, False, 48), (True, True, 48)):
        same = [one for one in records if is_held_out(one) == held_out and (one.dataset == "fsdd") == digits]
        found += same[:most]
    return found


def batch_of(model: PalModel, records: Sequence[Record], clips: dict[str, EncodedClip]) -> Batch:
    """A batch with one clip for each record."""
    rows = [
        encode(model.tokenizer, conversation_of(record, style=model.config.style), [i], train=True)
        for i, record in enumerate(records)
    ]
    return Batch([], rows, encoded=[clips[record.clips[0]] for record in records])


@torch.no_grad()
def held_out_loss(model: PalModel, records: Sequence[Record], clips: dict[str, EncodedClip]) -> dict[str, float]:
    """Loss a token, for sounds and for digits."""
    model.eval()
    found = {}
    for name, digits in (("sounds", False), ("digits", True)):
        group = [record for record in records if (record.dataset == "fsdd") == digits]
        total = tokens = 0.0
        for first in range(0, len(group), 8):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(batch_of(model, group[first : first + 8], clips))
            total, tokens = total + float(loss.sum), tokens + loss.items
        found[name] = round(total / tokens, 3)
    return found


def train(
    model: PalModel, records: Sequence[Record], clips: dict[str, EncodedClip], seed: int, steps: int
) -> list[object]:
    """Train connector and projectors; held-out losses before, in the middle and at the end."""
    rng = random.Random(seed)
    held_out = [record for record in records if is_held_out(record)]
    groups = [
        [record for record in records if not is_held_out(record) and (record.dataset == "fsdd") == digits]
        for digits in (False, True)
    ]
    model.requires_grad_(False)
    weights = [*model.ears.connectors.parameters(), *model.integration.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    curve: list[object] = [held_out_loss(model, held_out, clips)]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LR * min(1, step / WARMUP)
        model.train()
        drawn = [record for group in groups for record in rng.sample(group, 4)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(batch_of(model, drawn, clips))
        optimizer.zero_grad()
        (loss.sum / loss.items).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step in (steps // 2, steps):
            curve.append(held_out_loss(model, held_out, clips))
    return curve


def main() -> None:
    """Run all variants and seeds; finished runs in the file are not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, required=True)
    parser.add_argument("--fsdd", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gate.jsonl"
    done = (
        {(one["variant"], one["seed"]) for one in map(json.loads, file.read_text().splitlines())}
        if file.exists()
        else set()
    )
    records = chosen(args.esc10, args.fsdd)
    clips: dict[str, EncodedClip] = {}
    for seed in args.seeds:
        for name in args.only:
            if (name, seed) in done:
                continue
            torch.manual_seed(seed)
            model = pal.attach(
                llm="smollm2-135m-instruct",
                encoders=["whisper-tiny.en"],
                connector={"name": "strided_conv", "stride": 4},
                integration=VARIANTS[name],
            )
            for record in tqdm(records, desc="encoding", disable=bool(clips)):
                if record.clips[0] not in clips:
                    clips[record.clips[0]] = model.encode_clip(record.clips[0])
            curve = train(model, records, clips, seed, args.steps)
            line = json.dumps({"variant": name, "seed": seed, "steps": args.steps, "curve": curve})
            with file.open("a") as out:
                out.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
