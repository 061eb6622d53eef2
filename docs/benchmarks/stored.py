"""What storing less of a clip costs: a model's accuracy where keys and values are whole, rounded to int8, or thinned.

    pal demo
    python docs/benchmarks/stored.py runs/demo/lal/model runs/demo/held-out/manifest.jsonl

Keys are thinned by five rules: evenly spaced ones stay, random ones, those of the smallest or the largest norm, or
those that a probe question attends to most ("What can be heard?").
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import pal
from pal.backbone.audio_kv import AudioKV
from pal.data.manifest import Manifest, Record
from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.text import exact_match
from pal.model import PalModel
from pal.thinning import attention_scores, norm_scores

PROBE = "What can be heard?"
SHARES = (0.75, 0.5, 0.25, 0.1)
Change = Callable[[PalModel, AudioKV], AudioKV]


def by_norm(share: float, smallest: bool, model: PalModel, clip: AudioKV) -> AudioKV:
    """Keys of the smallest or the largest norm."""
    return clip.thin(share, norm_scores(clip, smallest))


def by_attention(share: float, model: PalModel, clip: AudioKV) -> AudioKV:
    """Keys that the probe question attends to."""
    return clip.thin(share, attention_scores(model, clip, PROBE))


def at_random(share: float, model: PalModel, clip: AudioKV) -> AudioKV:
    """Random keys, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    scores: list[Tensor | None] = [
        torch.rand(stream.k_LBGAC[:, :, 0, :, 0].shape, generator=generator) for stream in clip.streams
    ]
    return clip.thin(share, scores)


def changes() -> dict[str, Change]:
    """Name and function of each form of storage."""
    found: dict[str, Change] = {"whole": lambda model, clip: clip, "int8": lambda model, clip: clip.quantized()}
    for share in SHARES:
        found[f"evenly, {share:.0%}"] = lambda model, clip, share=share: clip.thin(share)
        found[f"random, {share:.0%}"] = partial(at_random, share)
        found[f"smallest keys, {share:.0%}"] = partial(by_norm, share, True)
        found[f"largest keys, {share:.0%}"] = partial(by_norm, share, False)
        found[f"by a question, {share:.0%}"] = partial(by_attention, share)
    return found


def main() -> None:
    """One row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("--only", nargs="+", help="only forms whose name begins so, and whole")
    parser.add_argument("--clips", type=int, default=600, help="most clips to ask about")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = pal.load(args.model)
    by_clip: dict[str, list[Record]] = {}
    for record in Manifest(args.manifest):
        if len(record.clips) == 1 and len(record.turns) == 1:
            by_clip.setdefault(record.clips[0], []).append(record)
    chosen = dict(list(by_clip.items())[: args.clips])
    right: dict[str, list[float]] = {}
    clips: list[str] = []
    for path, records in tqdm(chosen.items(), unit="clip"):
        whole = model.index(path)
        questions = [record.turns[0].question for record in records]
        clips += [path] * len(records)
        for name, change in changes().items():
            if args.only and name != "whole" and not name.startswith(tuple(args.only)):
                continue
            answers = model.ask(change(model, whole), questions, max_new_tokens=32)
            right.setdefault(name, []).extend(
                float(exact_match(answer, record.turns[0].answer))
                for answer, record in zip(answers, records, strict=True)
            )
    rows = []
    for name, scores in right.items():
        low, high = bootstrap_ci(scores, clips)
        changed = sum(a != b for a, b in zip(scores, right["whole"], strict=True))
        rows.append(
            {"stored": name, "accuracy": sum(scores) / len(scores), "low": low, "high": high, "changed": changed}
        )
    if args.json:
        print(json.dumps({"questions": len(clips), "rows": rows}))
        return
    print(f"{len(clips)} questions about {len(chosen)} clips\n")
    print("| stored | accuracy | 95 % interval | right or wrong otherwise |\n|---|---:|---|---:|")
    for row in rows:
        print(f"| {row['stored']} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['changed']} |")


if __name__ == "__main__":
    main()
