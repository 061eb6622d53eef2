"""`make bench`: one training step of each integration, on random weights, at several lengths of audio.

Encoder, connector and projectors are counted; the LLM has the width of a small Llama. Everything is
measured in one process, in turns, so that the ratios hold even where the times do not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pal.backbone.tokenizer import train_tokenizer
from pal.bench.measure import TrainingCost, training_costs
from pal.config import parse
from pal.data.prompts import encode, user_turn
from pal.model import PalModel
from pal.model_config import ModelConfig
from pal.train.recipe import Stage
from pal.types import Batch

VARIANTS: dict[str, dict[str, Any]] = {
    "plits": {"name": "plits"},
    "lal, all layers": {"name": "lal"},
    "lal, first third": {"name": "lal", "layers": "first_third"},
    "pal": {"name": "pal"},
}
LLM = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
STAGE = {
    "train": {"connector": True, "projectors": True, "llm": "full"},
    "lr": 1e-3,
    "steps": 1,
    "batch": {"rows": 1},
}


def costs(audio_tokens: int, text_words: int, rounds: int) -> dict[str, TrainingCost]:
    """The training costs of each variant for one clip of so many tokens and a conversation of so many words."""
    words = " ".join(f"word{i % 7}" for i in range(text_words))
    tokenizer = train_tokenizer([words], 300)
    models = {}
    for name, integration in VARIANTS.items():
        torch.manual_seed(0)
        fields = {"llm": {"fresh": LLM}, "encoders": ["tiny"], "integration": integration}
        models[name] = PalModel.from_config(parse(ModelConfig, fields, where="bench"), tokenizer)
    encoder = next(iter(models.values())).ears.encoder(0)
    samples = round(audio_tokens * encoder.seconds_per_token * encoder.sampling_rate)
    turns = [user_turn(words, 1), {"role": "assistant", "content": "word0 word1"}]
    batch = Batch([torch.randn(samples) * 0.1], [encode(tokenizer, turns, [0], train=True)])
    return training_costs(models, batch, parse(Stage, STAGE, where="bench"), rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio-tokens", type=int, nargs="+", default=[100, 750, 1500])
    parser.add_argument("--text-words", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for tokens in args.audio_tokens:
        found = costs(tokens, args.text_words, args.rounds)
        base = found["plits"]
        for name, cost in found.items():
            rows.append({"audio_tokens": tokens, "variant": name, **asdict(cost)})
            rows[-1]["speed_to_plits"] = base.step_seconds / cost.step_seconds
            rows[-1]["saved_to_plits"] = cost.saved_bytes / base.saved_bytes
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("audio tokens", "integration", "step", "x PLITS", "saved activations", "% of PLITS", "peak")
    for row in rows:
        table.add_row(
            str(row["audio_tokens"]),
            row["variant"],
            f"{row['step_seconds'] * 1000:.0f} ms",
            f"{row['speed_to_plits']:.2f}",
            f"{row['saved_bytes'] / 1e6:.1f} MB",
            f"{100 * row['saved_to_plits']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f} MB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
