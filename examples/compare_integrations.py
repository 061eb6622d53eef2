"""Compare two integrations on the same data, encoder and LLM: accuracy and cost.

    python examples/compare_integrations.py plits lal

Both start from the encoder and the text LLM that ship with the package, and train on the same synthetic scenes.
With 300 steps each, it takes a few minutes on two CPU cores and shows the cost; accuracy needs more steps.
"""

import sys
import tempfile
from pathlib import Path

import pal
from pal.config import parse
from pal.data.manifest import Manifest
from pal.data.synth import synthesise
from pal.evaluate import evaluate
from pal.train import run
from pal.train.recipe import Recipe


def main(*integrations: str, steps: int = 300, scenes: int = 800, held_out: int = 60) -> None:
    """Train each with the same recipe, and evaluate it on scenes of another seed."""
    stage = {
        "options": {"per": "answer"},
        "train": {"connector": True, "projectors": True, "llm": "full"},
        "lr": 2e-3,
        "warmup": min(50, steps),
        "steps": steps,
        "batch": {"clips": 8, "rows_per_clip": 6, "turns": 3},
    }
    with tempfile.TemporaryDirectory() as scratch:
        train = synthesise(Path(scratch) / "train", scenes, seed=1)
        test = [r for r in Manifest(synthesise(Path(scratch) / "test", held_out, seed=2)) if r.choices is not None]
        for name in integrations:
            model_fields = {"llm": str(pal.TEXT_LLM), "encoders": ["tiny"], "integration": name}
            fields = {"model": model_fields, "start": {"encoder": str(pal.SHIPPED)}, "stages": [stage]}
            recipe = parse(Recipe, fields | {"data": {"scenes": {"manifest": str(train)}}}, where="example")
            model = run(recipe, Path(scratch) / name)
            score = evaluate(model, test)
            no_audio = score.overall.no_audio_score
            print(f"{name}: {score.score:.3f} of {score.n} questions, {no_audio:.3f} without audio")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ("plits", "lal")))
