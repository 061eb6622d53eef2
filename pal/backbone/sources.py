"""Where an LLM comes from: what is no LLM of transformers' is refused by name, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pal.errors import ConfigError, PalError

_ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "spm", "tekken")
"""What the names of a tokenizer's files begin with."""


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of an LLM on the Hub or in a folder.

    Raises:
        PalError: an adapter, a GGUF file, quantised weights, or nothing that transformers reads.
    """
    _check_folder(Path(source))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        if _is_adapter(source, revision):
            raise _adapter_error(source) from None
        raise PalError(f"cannot load the LLM '{source}': {first_sentence(error)}") from None
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        fields = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = fields.get("quant_method") or "an unnamed method"
        raise PalError(
            f"the LLM '{source}' is quantised ({getattr(method, 'value', method)}), which is not supported; "
            "give the model it was made from, with dtype bfloat16 for less memory"
        )
    return config


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer on the Hub or in a folder.

    Raises:
        ConfigError: there is none that transformers reads.
    """
    remedy = "save it there with its save_pretrained, or name another folder or Hub id as the LLM's 'tokenizer'"
    folder = Path(source)
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER) for file in folder.iterdir()):
        raise ConfigError(f"'{source}' holds no tokenizer; {remedy}")
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # each kind of tokenizer has errors of its own for files that are missing or wrong
        raise ConfigError(f"cannot load the tokenizer '{source}': {first_sentence(error)}; {remedy}") from None
    return found


def first_sentence(error: Exception) -> str:
    """What an error of another library says, short enough for a line of ours."""
    text = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".:")
    return text[:160] or type(error).__name__


def _check_folder(folder: Path) -> None:
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        raise PalError(f"the LLM '{folder}' is no folder here; give one that transformers reads, or a Hub id")
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf")) and not _has_weights(folder)):
        raise PalError(f"the LLM '{folder}' is GGUF, which is not supported; give the safetensors it was made from")
    if folder.is_dir() and any(folder.glob("pytorch_model*.bin")) and not _has_weights(folder):
        raise PalError(f"the LLM '{folder}' has its weights as pickle, which is not read; save them as safetensors")
    if folder.is_dir() and (folder / _ADAPTER).is_file():
        raise _adapter_error(folder)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _is_adapter(source: str | Path, revision: str | None) -> bool:
    from transformers.utils import find_adapter_config_file

    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return find_adapter_config_file(str(source), **options) is not None
    except (OSError, ValueError):
        return False


def _adapter_error(source: str | Path) -> PalError:
    return PalError(
        f"the LLM '{source}' is an adapter of PEFT; merge it into its model (merge_and_unload), save that with the "
        "tokenizer, and give the folder"
    )
