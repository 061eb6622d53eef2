"""Configurations of public models, to plan with their sizes before any download.

Each entry has those fields of the published `config.json` that decide the model's shape; other fields have the defaults
of the architecture. An audio encoder of a larger model is in `audio_config`, as published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.pretrained import SMOLLM2, WHISPER, source_of


def _llama(
    width: int, ffn: int, layers: int, heads: int, head_width: int, factor: float = 32.0, tied: bool = True
) -> dict[str, Any]:
    """Llama 3.2, or with factor 8 Llama 3.1 and 3.3 (model cards of Meta; arXiv 2407.21783, table 3)."""
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_width,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
    }


def _qwen(width: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    """Qwen2.5 (arXiv 2412.15115, table 1, and its configurations)."""
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }


def _whisper(width: int, layers: int, heads: int, mels: int = 80) -> dict[str, Any]:
    """Whisper (arXiv 2212.04356, table 1); the encoder's fields only."""
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": mels,
    }


_SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""SmolLM2 (arXiv 2502.02737), as in the file of `pal.pretrained.SMOLLM2`."""
_LLAMA_1B = _llama(2048, 8192, 16, 32, 64)
_LLAMA_3B = _llama(3072, 8192, 28, 24, 128)
_LLAMA_8B = _llama(4096, 14336, 32, 32, 128, factor=8.0, tied=False)
_LLAMA_70B = _llama(8192, 28672, 80, 64, 128, factor=8.0, tied=False)
_QWEN_05B = _qwen(896, 4864, 24, 14, 2, 151936, tied=True)
_QWEN_15B = _qwen(1536, 8960, 28, 12, 2, 151936, tied=True)
_QWEN_3B = _qwen(2048, 11008, 36, 16, 2, 151936, tied=True)
_QWEN_7B = _qwen(3584, 18944, 28, 28, 4, 152064, tied=False)
_QWEN_14B = _qwen(5120, 13824, 48, 40, 8, 152064, tied=False)

CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Qwen/Qwen2.5-0.5B": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-1.5B": _QWEN_15B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_15B,
    "Qwen/Qwen2.5-3B": _QWEN_3B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN_3B,
    "Qwen/Qwen2.5-7B": _QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-14B": _QWEN_14B,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN_14B,
    SMOLLM2.hub_id: _SMOLLM2_135M,
    "openai/whisper-tiny": _whisper(384, 4, 6),
    WHISPER.hub_id: _whisper(384, 4, 6),
    "openai/whisper-base": _whisper(512, 6, 8),
    "openai/whisper-small": _whisper(768, 12, 12),
    "openai/whisper-medium": _whisper(1024, 24, 16),
    "openai/whisper-large": _whisper(1280, 32, 20),
    "openai/whisper-large-v2": _whisper(1280, 32, 20),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, mels=128),
    "openai/whisper-large-v3-turbo": _whisper(1280, 32, 20, mels=128),
    # transformers' ClapAudioConfig has the sizes of these two as its defaults
    "laion/clap-htsat-fused": {"model_type": "clap", "audio_config": {"enable_fusion": True}},
    "laion/clap-htsat-unfused": {"model_type": "clap", "audio_config": {"enable_fusion": False}},
    # AudioFlamingo3EncoderConfig's defaults: 32 layers of 1280, 128 mel bins
    "nvidia/audio-flamingo-3-hf": {"model_type": "audioflamingo3", "audio_config": {}},
    # EAT's ViT-B/16, the defaults of the encoder `sslam`
    "ta012/SSLAM_pretrain": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    # ASTConfig's defaults
    "MIT/ast-finetuned-audioset-10-10-0.4593": {"model_type": "audio-spectrogram-transformer"},
}
"""Hub id -> fields of its `config.json`."""


def config_of(path: str, revision: str | None = None) -> dict[str, Any]:
    """Fields of a model's `config.json`, from its folder or GGUF file, else the local Hub cache, else `CONFIGS`.

    Nothing is downloaded.

    Raises:
        ConfigError: none of the three has it, or the file is damaged.
    """
    from pal.backbone import gguf

    if gguf.is_gguf(path):
        read: dict[str, Any] = gguf.read_config(path).to_dict()
        return read
    source = source_of(path, revision)
    file = Path(source) / "config.json"
    if not file.is_file():
        cached = _cached(source, revision)
        if cached is None and source in CONFIGS:
            return dict(CONFIGS[source])
        if cached is None:
            raise ConfigError(
                f"the shape of '{path}' is not known here: no such folder, not in the local cache; "
                f"fetch it once with: hf download {path} config.json"
            )
        file = cached
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: is no JSON object; fetch it again")
    return fields


def _cached(path: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # neither a folder nor a Hub id
        return None
    return Path(found) if isinstance(found, str) else None
