"""PLITS, LAL (all layers), LAL (first third) and PAL under one curriculum, several seeds each.

    python recipes/compare.py --out runs/compare

Trains `compare.yaml` for each, evaluates on what was held back, and prints the table of
`docs/experiments.md`. What is finished is not done again.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from pal import train
from pal.data.manifest import Manifest, Record
from pal.data.prepare import prepare
from pal.data.synth import synthesise
from pal.evaluate import Score, evaluate
from pal.files import write_text
from pal.model import PalModel
from pal.train.recipe import load_recipe

VARIANTS: dict[str, Any] = {
    "PLITS": {"name": "plits"},
    "LAL, all layers": {"name": "lal", "layers": "all"},
    "LAL, first third": {"name": "lal", "layers": "first_third"},
    "PAL": {"name": "pal"},
}
HELD_OUT_SEED = 920_001
RECIPE = Path(__file__).with_name("compare.yaml")


def benchmarks(audio: Path, folder: Path) -> dict[str, list[Record]]:
    """Everything held back, by name; questions with allowed answers only."""
    scenes = folder / "scenes" / "manifest.jsonl"
    if not scenes.is_file():
        synthesise(folder / "scenes", 300, seed=HELD_OUT_SEED, questions_per_scene=4)
    paths = {
        "ESC-10 fold 4": prepare("esc50", audio / "esc10", folder / "esc10.jsonl", folds="4"),
        "FSDD, speaker theo": prepare("fsdd", audio / "fsdd", folder / "fsdd.jsonl", speakers="theo"),
        "scenes": scenes,
    }
    return {name: [r for r in Manifest(path) if r.choices is not None] for name, path in paths.items()}


def score_of(name: str, records: list[Record], run: Path, model: PalModel) -> Score:
    """The score of a trained model, kept beside it."""
    path = run / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.is_file():
        evaluate(model, records, no_audio=name == "scenes", batch=64, benchmark=name).save(path)
    return Score.load(path)


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--audio", type=Path, default=Path("../shared/audio"), help="folder with esc10/ and fsdd/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    held_out = benchmarks(args.audio, args.out / "held-out")
    results: dict[str, dict[str, list[float]]] = {name: {} for name in args.only}
    for seed in range(1, args.seeds + 1):
        for name in args.only:
            integration = VARIANTS[name]
            run = args.out / f"{name.replace(',', '').replace(' ', '_').lower()}-{seed}"
            recipe = load_recipe(
                RECIPE,
                [
                    f"seed={seed}",
                    f"model.integration={json.dumps(integration)}",
                    f"data.esc10.prepare.root={args.audio / 'esc10'}",
                    f"data.fsdd.prepare.root={args.audio / 'fsdd'}",
                ],
            )
            shared = args.out / "data"
            shared.mkdir(parents=True, exist_ok=True)
            run.mkdir(parents=True, exist_ok=True)
            if not (run / "data").exists():
                (run / "data").symlink_to(shared.resolve(), target_is_directory=True)
            model = train.run(recipe, run, resume=True)
            row = results[name]
            for benchmark, records in held_out.items():
                row.setdefault(benchmark, []).append(score_of(benchmark, records, run, model).score)
            report = json.loads((run / "train.json").read_text())
            row.setdefault("minutes of training", []).append(report["seconds"] / 60)
            print(name, seed, {key: round(values[-1], 3) for key, values in row.items()}, flush=True)
    columns = [*held_out, "minutes of training"]
    lines = ["| integration | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        cells = [f"{statistics.mean(row[c]):.3f} ({min(row[c]):.3f} to {max(row[c]):.3f})" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.only == list(VARIANTS):
        write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
