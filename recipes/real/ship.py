"""Turns a run on real components into the package data of `pal/assets/smol`: trained parts in bfloat16, and the card.

    python recipes/real/ship.py runs/real/smol

What is measured is what is shipped, rounding included, on the curriculum's held-out questions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from held_out import SETS, scores, text_answers
from safetensors.torch import load_file

import pal
from pal import shipped
from pal.files import write_json, write_text
from pal.memory import keep_freed_memory
from pal.model import PalModel

LARGEST = 16_000_000
"""Bytes that the bundle may take."""

NOTICE = (
    "a small model: it knows short sentences of synthetic voices, spoken digits, ten kinds of sounds and 24 instruments"
)

CARD = """---
license: apache-2.0
pipeline_tag: audio-text-to-text
library_name: pal-audio
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# smol: a language model of 135 million parameters that listens

SmolLM2-135M-Instruct with the encoder of Whisper tiny.en, attached by `{integration}`. This folder has the parts that
were trained: connector, projectors and LoRA adapters, {trained:,} parameters in bfloat16. The two pretrained models
stay as they are; `pal models get smol` downloads them.

## What it was trained on

{clips:,} clips of `pal data curriculum` (seed {seed}): ESC-10 folds 1 to 3 and mixtures of them, spoken digits of four
speakers, sentences and word lists by flite and eSpeak NG, notes and melodies by FluidSynth. Recipes:
{recipes}; {minutes:.0f} minutes on two CPU cores in all. No recorded speech but the digits.

## What it can do

Answer short questions like those below about clips of up to 8 seconds: transcribe a clearly spoken English sentence of
common words, say whether a word is spoken, name a digit, one of ten sounds, an instrument or its family. Questions
without audio are answered by SmolLM2 itself: the adapters are used only where there is audio. The scores below say how
well it does each; where a score is near the one without audio, it has not learned the task.

## What it cannot do

Long recordings, noisy or emotional speech, other languages, other sounds: it was not trained on them and does not know
that it does not know them. It is no basis for a decision of any kind.

## Measured

Greedy decoding, exact match unless said, 95 % bootstrap intervals, by `python recipes/real/ship.py`:

| data | n | score | 95 % interval | the same model without audio |
|---|---:|---:|---|---:|
{scores}

Nothing of this was trained on: other recordings, another speaker, other voices and sentences, another sound font. The
instruments were chosen so that they differ in both sound fonts (docs/curriculum.md).

Questions without audio: of {prompts} fixed prompts, {asked:.0%} have the same first sentence as SmolLM2's own answer.
With the adapters on, as in no use of this model, it would be {adapted:.0%}, and the loss of SmolLM2's answers
{loss_after:.3f} a token instead of {loss_before:.3f}.
"""


def card(
    model: PalModel, found: dict[str, Any], text: dict[str, Any], reports: list[dict[str, Any]], made: dict[str, Any]
) -> str:
    """The model card as Markdown; `made` is the curriculum's description."""
    rows = []
    for name, own in found.items():
        low, high = own["ci95"]
        rows.append(f"| {name} | {own['n']} | {own['score']:.3f} | {low:.3f} to {high:.3f} | {own['no_audio']:.3f} |")
    return CARD.format(
        integration=model.config.integration["name"],
        trained=sum(tensor.numel() for tensor in load_file(shipped.SMOL / "model.safetensors").values()),
        clips=made["clips"],
        seed=made["seed"],
        recipes=", ".join(f"`recipes/real/{report['name']}.yaml`" for report in reports),
        minutes=sum(report["seconds"] for report in reports) / 60,
        scores="\n".join(rows),
        prompts=text["prompts"],
        asked=text["same_first_sentence_asked"],
        adapted=text["same_first_sentence"],
        loss_before=text["loss_before"],
        loss_after=text["loss_after"],
    )


def main() -> None:
    """Write, measure, check the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs that made the model; the last is shipped")
    parser.add_argument("--curriculum", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--only", nargs="+", choices=list(SETS), help="some of the sets, to try the script")
    args = parser.parse_args()
    keep_freed_memory()
    model = pal.load(args.runs[-1])
    model.config = model.config.model_copy(update={"notice": NOTICE, "adapters": "with_audio"})
    model.save_pretrained(shipped.SMOL, dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in shipped.SMOL.iterdir())
    print(f"{shipped.SMOL}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        raise SystemExit(f"error: the bundle may take {LARGEST / 1e6:.0f} MB; train fewer parameters")
    model = pal.load("smol")
    found, text = scores(model, args.curriculum, only=args.only), text_answers(model)
    reports = [json.loads((run / "train.json").read_text()) | {"name": run.name} for run in args.runs]
    write_json(args.runs[-1] / "shipped.json", {"scores": found, "text": text})
    made = json.loads((args.curriculum / "curriculum.json").read_text())
    write_text(shipped.SMOL / "README.md", card(model, found, text, reports, made))


if __name__ == "__main__":
    main()
