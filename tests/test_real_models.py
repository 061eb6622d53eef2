"""SmolLM2-135M-Instruct and Whisper tiny.en as `pal models get smol` converts them; skipped where they are missing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import WhisperFeatureExtractor

import pal
from pal import hub_configs, shipped
from pal.backbone.adapters import disabled
from pal.backbone.llm import Backbone
from pal.backbone.sources import load_tokenizer
from pal.pretrained import GET, SMOLLM2, WHISPER, KnownModel, folder_of, is_cached
from pal.registry import build
from tests.models import noise, tone

REFERENCE = Path(__file__).parent / "assets" / "whisper-tiny.en.safetensors"
"""Every 50th token and 8th number of what CTranslate2's encoder makes of `frames` with the file of the package, which
the cache does not keep: `python -m tests.test_real_models FOLDER_WITH_MODEL_BIN`."""


def frames() -> Tensor:
    """Log-mel frames [B, M, F] of a sound for half of the window, and of noise for all of it."""
    clips = [tone(15, 440) + noise(15, seed=1), noise(30, seed=2)]
    made = WhisperFeatureExtractor()([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt")
    features: Tensor = made.input_features
    return features


def sampled(x_BAE: Tensor) -> Tensor:
    return x_BAE[:, ::50, ::8].contiguous()


def needs(model: KnownModel) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_cached(model.name), reason=f"{model.name} is not in the cache; run: {GET}")


@needs(SMOLLM2)
def test_the_llm_answers() -> None:
    llm, tokenizer = Backbone.load(SMOLLM2.name), load_tokenizer(SMOLLM2.name)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids_BT = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer_BT = llm.lm.generate(**ids_BT, max_new_tokens=12, do_sample=False)
    new = answer_BT[0, ids_BT["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert new[-1] == tokenizer.eos_token_id == 2


@needs(SMOLLM2)
@needs(WHISPER)
def test_shapes_known_without_the_models_are_theirs() -> None:
    for model in (SMOLLM2, WHISPER):
        config = json.loads((folder_of(model.name) / "config.json").read_text())
        for name, value in hub_configs.CONFIGS[model.hub_id].items():
            found = config["rope_parameters"][name] if name == "rope_theta" else config[name]
            assert found == pytest.approx(value) if isinstance(value, float) else found == value, name


@needs(WHISPER)
def test_the_encoder_is_ctranslate2s() -> None:
    encoder = build("encoder", {"name": "whisper", "path": WHISPER.name}).eval()
    with torch.inference_mode():
        x_BAE = encoder.network(frames()).last_hidden_state
    expected_BAE = load_file(REFERENCE)["sampled"]
    # values reach 9; seen: 3e-5 between the two on one machine
    torch.testing.assert_close(sampled(x_BAE), expected_BAE, atol=2e-3, rtol=0)


def record(folder: str) -> None:
    """Write `REFERENCE`."""
    import ctranslate2

    model = ctranslate2.models.Whisper(folder, device="cpu", compute_type="float32")
    x_BAE = torch.from_numpy(np.array(model.encode(ctranslate2.StorageView.from_array(frames().numpy()))))
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file({"sampled": sampled(x_BAE)}, REFERENCE)


if __name__ == "__main__":
    record(sys.argv[1])


@needs(SMOLLM2)
@needs(WHISPER)
def test_smol_hears_and_answers_text_as_its_llm() -> None:
    model = pal.load("smol")
    assert model.source == "smol"
    assert model.ask(str(shipped.RECORDING), "What sound is this?") == "dog"
    question = "What is the capital of France?"
    assert model.ask([], question, max_new_tokens=12) == "The capital of France is Paris."
    with disabled(model.llm):
        plain = model.ask([], question, max_new_tokens=12)
    assert plain == model.ask([], question, max_new_tokens=12)


def test_smol_is_small_and_says_where_it_came_from() -> None:
    assert sum(path.stat().st_size for path in shipped.SMOL.iterdir()) <= 16_000_000
    card = (shipped.SMOL / "README.md").read_text(encoding="utf-8")
    assert "pal data curriculum" in card and "What it cannot do" in card
