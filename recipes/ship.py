"""Turns a run of `tiny.yaml` or `tiny-causal.yaml` into package data of `pal/assets`: bundle, LLM and model card.

    pal train recipes/tiny.yaml --out runs/tiny
    python recipes/ship.py runs/tiny
    pal train recipes/tiny-causal.yaml --out runs/tiny-causal
    python recipes/ship.py runs/tiny-causal --name tiny-causal

The scores in the card are measured here, on what the recipe held back and on scenes of another seed.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

import pal
from pal.data.manifest import Manifest, Record
from pal.data.prepare import prepare
from pal.data.synth import synthesise
from pal.evaluate import Result, evaluate, from_records
from pal.files import MANIFEST, atomic_folder, write_text
from pal.model import PalModel

ASSETS = Path(pal.__file__).parent / "assets"
LARGEST = 16_000_000
"""Bytes that a run's package data may take."""
HELD_OUT_SEED = 910_001

NOTICE = (
    "a toy: knows 21 made-up kinds of sound in short scenes, the 10 classes of ESC-10 and spoken English digits, "
    "and answers anything else all the same"
)

CARD = """---
license: apache-2.0
pipeline_tag: audio-text-to-text
library_name: pal-audio
---
# {title}

A toy that shows the machinery: {parameters:,} parameters (encoder {encoder:,}, LLM {llm:,}, connector and
projectors {rest:,}), all trained {origin} in {minutes:.0f} minutes on {cores}.
Integration: `pal`, the paper's hybrid. Stored in half precision.

## What it was trained on

{data}

## What it can do

Answer short English questions, worded like the ones below, about short clips:

- made-up scenes of 1 to 4 sounds ({kinds}): what sounds, in which order, how many, whether, when, how high, how loud,
  and a caption;
- a recording of one of ESC-10's classes: "What sound is this?";
- one spoken English digit: "Which digit is spoken?".

## What it cannot do

Anything else. It has never seen other words, sounds, languages or longer questions, and it does not know that it does
not know: asked about music, sentences or a sound outside these lists it gives one of the answers above. Scenes were
4 seconds long; on longer clips "when" and "how many" are guesses. It is no basis for a decision of any kind.

## Measured

Exact match, greedy decoding, 95 % bootstrap intervals, by `{command}`:

Settings of the recipe were chosen by looking at these scores, so they flatter the model a little: nothing was trained
on this data, but no third set was kept aside.

| data | n | accuracy | 95 % interval | the same model without audio |
|---|---|---|---|---|
{scores}

Per task on the held-out scenes:

| task | n | accuracy | without audio |
|---|---|---|---|
{tasks}
"""


def closed(records: Manifest) -> list[Record]:
    """Records with allowed answers; captions have none."""
    return [record for record in records if record.choices is not None]


def measure(model: PalModel, audio: Path, scratch: Path) -> dict[str, Result]:
    """Scores on everything that was held back and is there."""
    made = {"held-out scenes": synthesise(scratch / "scenes", 300, seed=HELD_OUT_SEED)}
    if (audio / "esc10").is_dir():
        made["ESC-10 fold 4"] = prepare("esc50", audio / "esc10", scratch / "esc10.jsonl", folds="4")
    if (audio / "fsdd").is_dir():
        made["FSDD, speaker theo"] = prepare("fsdd", audio / "fsdd", scratch / "fsdd.jsonl", speakers="theo")
    return {name: evaluate(model, from_records(closed(Manifest(path)), name)) for name, path in made.items()}


TITLES = {
    "tiny": "tiny: the model that ships with pal",
    "tiny-causal": "tiny-causal: `tiny` for streams, with an encoder that hears nothing ahead",
}
ORIGINS = {
    "tiny": "from random weights by `recipes/tiny.yaml`",
    "tiny-causal": "further from those of `tiny` by `recipes/tiny-causal.yaml`",
}


def card(name: str, model: PalModel, scores: dict[str, Result], report: dict) -> str:
    """The model card as Markdown."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    from pal.data.synth.events import KINDS

    lines = []
    recipe = report["recipe"]["data"]
    for source_name, source in recipe.items():
        if source_name not in report["data"]:
            continue
        if source.get("synth"):
            lines.append(f"- {source['synth']['scenes']} scenes of `pal data synth` (seed {source['synth']['seed']});")
        else:
            options = ", ".join(f"{key}: {value}" for key, value in source["prepare"]["options"].items())
            lines.append(f"- real recordings, `{source['prepare']['name']}` ({options}), with augmentation;")
    rows = [
        f"| {held_out} | {s.n} | {s.score:.3f} | {s.overall.ci95[0]:.3f} to {s.overall.ci95[1]:.3f} "
        f"| {s.overall.no_audio_score:.3f} |"
        for held_out, s in scores.items()
    ]
    tasks = [
        f"| {task} | {a.n} | {a.score:.3f} | {a.no_audio_score:.3f} |"
        for task, a in sorted(scores["held-out scenes"].categories["task"].items())
    ]
    return CARD.format(
        title=TITLES[name],
        origin=ORIGINS[name],
        cores="two CPU cores" if name == "tiny" else "one busy CPU core",
        command="python recipes/ship.py" + ("" if name == "tiny" else f" --name {name}"),
        parameters=sum(sizes.values()),
        encoder=sizes["encoder"],
        llm=sizes["llm"],
        rest=sizes["connector"] + sizes["projectors"],
        minutes=report["seconds"] / 60,
        data="\n".join(dict.fromkeys(lines)),
        kinds=", ".join(KINDS),
        scores="\n".join(rows),
        tasks="\n".join(tasks),
    )


def main() -> None:
    """Measure, write, check the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that pal train wrote")
    parser.add_argument("--name", choices=TITLES, default="tiny", help="of the shipped model")
    parser.add_argument("--audio", type=Path, default=Path("../shared/audio"), help="folder with esc10/ and fsdd/")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()

    model = pal.load(args.run)
    report = json.loads((args.run / "train.json").read_text())
    model.config = model.config.model_copy(update={"notice": NOTICE})
    place = args.assets / args.name
    model.save_pretrained(place, full=True, dtype=torch.float16)
    # What is measured is what is shipped, rounding included.
    shipped = pal.load(place)
    scores = measure(shipped, args.audio, args.run / "held-out")
    for name, score in scores.items():
        score.save(args.run / "held-out" / f"{name.replace(' ', '_').replace(',', '')}.json")
        print(f"{name}: {score.score:.3f} of {score.n}")
    write_text(place / "README.md", card(args.name, shipped, scores, report))
    made = [place]
    if (args.run / "llm").is_dir():  # the LLM before it heard anything
        made.append(args.assets / "tiny-lm")
        with atomic_folder(made[-1]) as folder:
            for path in (args.run / "llm").iterdir():
                if path.name != MANIFEST:
                    shutil.copy(path, folder)
    size = sum(path.stat().st_size for folder in made for path in folder.rglob("*") if path.is_file())
    print(f"{args.assets}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        raise SystemExit(f"error: the package data may take {LARGEST / 1e6:.0f} MB; make the model smaller")


if __name__ == "__main__":
    main()
