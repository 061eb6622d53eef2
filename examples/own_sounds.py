"""Fine-tune on a folder of your own clips: one folder for each label.

    python examples/own_sounds.py sounds runs/mine
    pal ask clip.wav "What sound is this?" --model runs/mine

`sounds/` contains `bark/*.wav`, `engine/*.wav`, ... A fifth of the clips is held out for evaluation. Training starts
from the model that ships with the package; for a larger model, change `bundle`.
"""

import sys
import tempfile
from pathlib import Path

import pal
from pal.config import parse
from pal.data.manifest import Manifest
from pal.data.prepare import prepare
from pal.evaluate import evaluate
from pal.train import run
from pal.train.recipe import Recipe


def main(sounds: str, out: str, steps: int = 150) -> None:
    """Fine-tune on most of the clips, and evaluate on the others."""
    stage = {"train": {"connector": True, "projectors": True, "llm": "full"}, "lr": 1e-3, "warmup": 10, "steps": steps}
    source = {"prepare": {"name": "folder", "root": sounds, "options": {"part": "train"}}}
    source["augment"] = {"probability": 0.8, "gain_db": [-12, 6], "speed": [0.9, 1.1], "time_shift": 1.0, "wrap": True}
    fields = {"bundle": str(pal.SHIPPED), "data": {"own": source}, "stages": [stage | {"batch": {"clips": 8}}]}
    model = run(parse(Recipe, fields, where="example"), out)
    with tempfile.TemporaryDirectory() as scratch:
        test = Manifest(prepare("folder", sounds, Path(scratch) / "test.jsonl", part="test"))
        score = evaluate(model, list(test))
        print(f"{score.n} held-out clips: {score.score:.2f}, {score.overall.no_audio_score:.2f} without audio")


if __name__ == "__main__":
    main(*sys.argv[1:3])
