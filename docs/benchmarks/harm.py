"""Do untrained models answer as their LLM does? Greedy answers to 50 prompts, with and without a clip.

python docs/benchmarks/harm.py CLIP.wav
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

import pal
from pal.memory import keep_freed_memory

PROMPTS = Path(__file__).parents[2].joinpath("recipes/real/prompts.txt").read_text(encoding="utf-8").splitlines()
SHARED = {"positions": "shared"}
VARIANTS: dict[str, dict[str, object]] = {
    "LAL, gate, shared positions": {"name": "lal", "gate": -16, **SHARED},
    "first third, gate, shared positions": {"name": "lal", "layers": "first_third", "gate": -16, **SHARED},
    "PAL, gate, shared positions": {"name": "pal", "gate": -16, **SHARED},
    "audio queries, gate, shared positions": {"name": "lal_audio_query", "gate": -16, **SHARED},
    "LAL, bias -16 alone, shared positions": {"name": "lal", "gate": -16, "key_scale": 1.0, **SHARED},
    "LAL, bias -32 alone, shared positions": {"name": "lal", "gate": -32, "key_scale": 1.0, **SHARED},
    "LAL, bias -16 alone, reserved positions": {"name": "lal", "gate": -16, "key_scale": 1.0},
    "LAL, gate": {"name": "lal", "gate": -16},
    "LAL, shared positions": {"name": "lal", **SHARED},
    "LAL": {"name": "lal"},
    "PAL": {"name": "pal"},
    "PLITS": {"name": "plits"},
    "Flamingo": {"name": "flamingo"},
}


def main() -> None:
    """Print one line of JSON a variant: equal answers, of how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    keep_freed_memory()
    expected: list[str] = []
    for name in args.only:
        torch.manual_seed(0)
        model = pal.attach(
            llm="smollm2-135m-instruct",
            encoders=["whisper-tiny.en"],
            connector={"name": "strided_conv", "stride": 4},
            integration=VARIANTS[name],
        )
        if not expected:
            expected = [model.ask([], prompt, max_new_tokens=args.tokens) for prompt in tqdm(PROMPTS, desc="text")]
        clip = model.encode_clip(args.clip)
        found = [model.ask(clip, prompt, max_new_tokens=args.tokens) for prompt in tqdm(PROMPTS, desc=name)]
        equal = sum(one == other for one, other in zip(found, expected, strict=True))
        print(json.dumps({"variant": name, "equal": equal, "of": len(PROMPTS), "tokens": args.tokens}), flush=True)


if __name__ == "__main__":
    main()
