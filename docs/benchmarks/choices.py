"""What two choices of the implementation are worth on this machine; docs/experiments.md quotes it.

python docs/benchmarks/choices.py attention   audio and text attended to apart, or under one mask
python docs/benchmarks/choices.py making      audio keys and values by layer, folded, folded and all layers at once
"""

import argparse
from unittest.mock import patch

import torch
import torch.nn.functional as F

from pal import hub_configs
from pal.backbone.llm import Backbone
from pal.bench.measure import counts, step_seconds
from pal.bench.models import attached
from pal.bench.presets import preset_of
from pal.bench.scene import make_scene
from pal.memory import keep_freed_memory
from pal.registry import build
from pal.types import AudioFeatures

PRESET = preset_of("cpu")
CHOICE = "pal.backbone.attention_metadata.supports_split_attention"


def attention(rounds: int) -> None:
    """A training step of the preset `cpu`, the LLM trained."""
    keep_freed_memory()
    llm = Backbone.load(PRESET.llm).eval()
    print("| audio tokens | variant | attention | s | saved MB | GFLOP |\n|---|---|---|--:|--:|--:|")
    for tokens in (750, 1500):
        scene = make_scene(PRESET, 1, tokens, llm.vocab, None)
        for name in ("lal", "pal"):
            subject = attached(name, llm, PRESET)
            for parameter in subject.weights():
                parameter.requires_grad_(True)

            def step(apart: bool, subject=subject, scene=scene) -> None:
                with patch(CHOICE, return_value=apart):
                    subject.loss(scene).backward()
                for parameter in subject.weights():
                    parameter.grad = None

            ways = {"apart": True, "one mask": False}
            seconds = step_seconds({way: lambda a=apart: step(a) for way, apart in ways.items()}, rounds)
            for way, apart in ways.items():
                with patch(CHOICE, return_value=apart):
                    found = counts(
                        lambda subject=subject, scene=scene: subject.loss(scene),
                        backward=lambda loss: loss.backward(),
                        weights=subject.weights(),
                    )
                row = f"{seconds[way]:.2f} | {found.saved_bytes / 1e6:.0f} | {found.flops / 1e9:.0f}"
                print(f"| {tokens} | {name} | {way} | {row} |", flush=True)
                for parameter in subject.weights():
                    parameter.grad = None


@torch.no_grad()
def making(rounds: int) -> None:
    """Keys and values of a clip in all 16 layers of a Llama-3.2-1B, projectors 768 wide inside."""
    llm = Backbone.load({**hub_configs.CONFIGS["meta-llama/Llama-3.2-1B-Instruct"], "vocab_size": 1000}).eval()
    plain, folded = (build("integration", {"name": "lal", "hidden": 768}, in_width=768, llm=llm) for _ in range(2))
    folded.load_state_dict(plain.state_dict())
    layers = range(folded.fold(llm))
    firsts = [folded.projectors.of(layer)[0] for layer in layers]
    first_XE, first_X = (torch.cat([getattr(first, name) for first in firsts]) for name in ("weight", "bias"))
    folds = [folded.projectors.folded(layer, llm) for layer in layers]
    second_LMX = torch.stack([one.weight_XM.T for one in folds])
    second_L1X = torch.stack([one.bias_X for one in folds])[:, None]
    shared = 2 * llm.kv_heads * llm.head_width

    def grouped(x_AE: torch.Tensor) -> torch.Tensor:
        h_LAM = F.gelu(F.linear(x_AE, first_XE, first_X)).unflatten(-1, (len(layers), -1)).transpose(0, 1)
        y_LAX = torch.baddbmm(second_L1X, h_LAM, second_LMX)
        squares_LA1 = y_LAX[..., shared:].square().sum(-1, keepdim=True)
        return y_LAX[..., :shared] * (squares_LA1 / llm.width + folds[0].eps).rsqrt()

    print("| audio tokens | by layer, ms | folded, ms | folded and grouped, ms |\n|--:|--:|--:|--:|")
    for tokens in (16, 64, 256, 750, 1500):
        x_1AE = torch.randn(1, tokens, 768)
        features = AudioFeatures(x_1AE, (tokens,), 0.04)
        keys = {"plain": plain.inject(features, llm).keys, "folded": folded.inject(features, llm).keys}
        k_GAC = keys["plain"].keys_values(3)[0][0]
        same = grouped(x_1AE[0])[3, :, : shared // 2].unflatten(-1, (llm.kv_heads, -1)).transpose(0, 1)
        assert torch.allclose(same, k_GAC, atol=1e-5), "the grouped product is wrong"
        steps = {way: lambda s=source: [s.keys_values(layer) for layer in layers] for way, source in keys.items()}
        seconds = step_seconds({**steps, "grouped": lambda x=x_1AE: grouped(x[0])}, rounds)
        print(f"| {tokens} | " + " | ".join(f"{1e3 * value:.1f}" for value in seconds.values()) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["attention", "making"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    {"attention": attention, "making": making}[given.what](given.rounds)
