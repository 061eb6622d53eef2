"""What OpenAQA's curriculum costs on 8 H100, by LLM and integration: the table of docs/training.md.

    python docs/benchmarks/curriculum_cost.py

Everything is computed by `pal plan`, in a minute; the rate is one that was measured (docs/benchmarks/gpu-train).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pal.plan import plan
from pal.plan.estimate import StagePlan
from pal.plan.parallel import Parallel
from pal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "paper" / "llama-3.2-1b"
RECORDS = {"classification": 1_190_000, "all": 5_600_000}
"""Records of the two sources of the paper's recipes, as LTU publishes them."""
MFU = 0.41
"""411 TFLOP/s of 989: Llama-3.2-1B on 8 rows of 128 text tokens, one H200 (docs/benchmarks/gpu-train/gpu.md). At
OpenAQA's 10 s LFST gives 32 audio tokens, so rows are as short as these."""


@dataclass(frozen=True)
class Setting:
    """An LLM and how it is trained on 8 GPUs."""

    name: str
    llm: str
    sharded: bool
    accumulate: tuple[int, int]
    """Forward passes of a GPU's 32 rows, in stages 1 and 2."""
    options: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"


HALF = ["stages.1.master_weights=true", "stages.0.gradient_checkpointing=true"]
LORA = ["stages.1.train.llm=lora", "stages.0.gradient_checkpointing=true"]
SETTINGS = [
    Setting("Llama-3.2-1B, whole, copies", "meta-llama/Llama-3.2-1B-Instruct", False, (2, 4), dtype="float32"),
    Setting("Llama-3.1-8B, whole, sharded", "meta-llama/Llama-3.1-8B-Instruct", True, (2, 2), HALF),
    Setting("Qwen2.5-14B, whole, sharded", "Qwen/Qwen2.5-14B-Instruct", True, (2, 2), HALF),
    Setting("Llama-3.1-70B, whole, sharded", "meta-llama/Llama-3.1-70B-Instruct", True, (2, 2), HALF),
    Setting("Llama-3.1-70B, LoRA, sharded", "meta-llama/Llama-3.1-70B-Instruct", True, (2, 2), LORA),
]


def main() -> None:
    """Print the table in Markdown."""
    print("| LLM | integration | GB a GPU, stages 1 and 2 | s a step | exchanges, s | hours | H100 hours |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for setting in SETTINGS:
        for integration in ("plits", "lal", "pal"):
            options = [f"model.llm={{path: {setting.llm}, dtype: {setting.dtype}}}"]
            options += [f"stages.{i}.batch.accumulate={n}" for i, n in enumerate(setting.accumulate)]
            recipe = load_recipe(RECIPES / f"{integration}.yaml", [*options, *setting.options])
            made = plan(recipe, parallel=Parallel(8, setting.sharded), utilisation=MFU, records=RECORDS)
            hours = sum((stage.steps or 0) * stage.seconds for stage in made.stages) / 3600
            cells = [
                setting.name,
                integration.upper(),
                ", ".join(_memory(stage) for stage in made.stages),
                ", ".join(f"{stage.seconds:.2f}" for stage in made.stages),
                ", ".join(f"{stage.exchange_seconds:.2f}" for stage in made.stages),
                f"{hours:.1f}",
                f"{8 * hours:.0f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def _memory(stage: StagePlan) -> str:
    return f"{stage.memory.total / 1e9:.0f}" + ("" if stage.fits else " (does not fit)")


if __name__ == "__main__":
    main()
