"""A model of full size on a CPU: `make full-size`. Not among the other tests, since it takes minutes and gigabytes.

Llama-3.2-1B's shape hears Whisper-small's by LAL in all layers, with random weights, and answers about 30 seconds.
"""

import resource
import time

import torch

from pal.backbone.tokenizer import train_tokenizer
from pal.config import parse
from pal.hub_configs import config_of
from pal.model import PalModel
from pal.model_config import ModelConfig

MEMORY = 24 << 30
"""Bytes that the process may take."""


def test_an_answer_about_thirty_seconds() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.manual_seed(0)
    config = {
        "llm": {"fresh": config_of("meta-llama/Llama-3.2-1B-Instruct")},
        "encoders": [{"name": "whisper", "architecture": config_of("openai/whisper-small")}],
        "integration": "lal",
    }
    started = time.perf_counter()
    model = PalModel.from_config(parse(ModelConfig, config, where="full size"), train_tokenizer(["What is it?"], 300))
    model.eval()
    assert sum(p.numel() for p in model.llm.parameters()) == 1_235_814_400
    built = time.perf_counter()
    clip = (0.1 * torch.randn(30 * 16_000)).numpy()
    (answer,) = model.ask_detailed((clip, 16_000), "What do you hear?", max_new_tokens=8, min_new_tokens=8)
    done = time.perf_counter()
    assert answer.audio_tokens == 1500 and answer.audio_seconds_used == 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in answer.seconds.items())
    print(
        f"\nbuilt in {built - started:.1f} s, answered in {done - built:.1f} s ({steps}), at most {peak / 2**30:.1f} GiB"
    )
    assert peak < MEMORY
