"""Very small whole models with random weights, for tests of what stands on top of them."""

import json

import torch

import pal
from pal.backbone.tokenizer import train_tokenizer
from pal.config import parse
from pal.model import PalModel
from pal.model_config import ModelConfig

INTEGRATIONS = ("plits", "lal", "pal")

WORDS = ["What sound is this?", "Which comes first, the dog or the bell?", "yes", "no", "a loud siren"]

LLM = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    # Far from the default 0.02, so that what is heard changes what is said.
    "initializer_range": 0.3,
}

ENCODER = {"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1}


def tiny_model(
    integration: str | dict[str, object] = "pal", seed: int = 0, warm: bool = True, **options: object
) -> PalModel:
    """A model of a few thousand random weights, in evaluation mode."""
    torch.manual_seed(seed)
    fields = {"llm": {"fresh": LLM}, "encoders": [ENCODER], "integration": integration, **options}
    model = PalModel.from_config(parse(ModelConfig, fields, where="test"), train_tokenizer(WORDS, 320))
    with torch.no_grad():
        for parameter in model.integration.parameters():
            parameter.mul_(3)
        if warm:
            _spread_clips(model, json.dumps([fields, seed], sort_keys=True, default=str))
    return model.eval()


_STATISTICS: dict[str, dict[str, torch.Tensor]] = {}


def _spread_clips(model: PalModel, key: str) -> None:
    """Give encoders batch statistics that spread the clips out, as training would; worked out once per `key`."""
    encoders = model.ears.encoders
    if key not in _STATISTICS:
        encoders.train()
        for moment in range(20):
            model.ears.encode([noise(0.5, moment), tone(0.5, 200.0 * (moment + 1))])
        _STATISTICS[key] = {name: buffer.clone() for name, buffer in encoders.named_buffers()}
    for name, buffer in encoders.named_buffers():
        buffer.copy_(_STATISTICS[key][name])


def noise(seconds: float, seed: int = 0, rate: int = 16_000) -> torch.Tensor:
    """A clip that is not silent: noise whose loudness changes [N]."""
    generator = torch.Generator().manual_seed(seed)
    n = round(seconds * rate)
    return torch.randn(n, generator=generator) * torch.linspace(0.01, 0.3, n)


def tone(seconds: float, hz: float, rate: int = 16_000) -> torch.Tensor:
    """A sine [N]."""
    return 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * rate)) / rate)


__all__ = ["ENCODER", "INTEGRATIONS", "LLM", "WORDS", "noise", "pal", "tiny_model", "tone"]
