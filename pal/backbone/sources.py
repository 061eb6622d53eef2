"""Checks of an LLM's source: what is not a transformers LLM is refused by name, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pal.backbone import gguf
from pal.errors import ConfigError, PalError, first_sentence
from pal.pretrained import remedy, source_of

_ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "spm", "tekken")
"""Prefixes of the names of tokenizer files."""


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of an LLM on the Hub, in a folder or in a GGUF file.

    Raises:
        PalError: an adapter, quantised weights, or a source that transformers cannot read.
    """
    if gguf.is_gguf(source):
        return gguf.read_config(source)
    found = source_of(source, revision)
    _check_folder(Path(found))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(found, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        if _is_adapter(found, revision):
            raise _adapter_error(source) from None
        advice = "; its config.json must be one that transformers reads" if Path(found).is_dir() else remedy(source)
        raise PalError(f"cannot load the LLM '{source}': {first_sentence(error)}{advice}") from None
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
    """The tokenizer on the Hub, in a folder or in a GGUF file.

    Raises:
        ConfigError: there is no tokenizer that transformers can read.
    """
    if gguf.is_gguf(source):
        return gguf.read_tokenizer(source)
    advice = "save it there with its save_pretrained, or name another folder or Hub id as the LLM's 'tokenizer'"
    found = source_of(source, revision)
    folder = Path(found)
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER) for file in folder.iterdir()):
        raise ConfigError(f"'{source}' holds no tokenizer; {advice}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(found, revision=revision)
    except Exception as error:  # each kind of tokenizer raises other errors for missing or wrong files
        if (folder / "tokenizer.json").is_file():
            advice = f"copy or download its files again, or {advice.partition('or ')[2]}"
        advice = remedy(source) or f"; {advice}"
        raise ConfigError(f"cannot load the tokenizer '{source}': {first_sentence(error)}{advice}") from None
    return tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        raise PalError(f"the LLM '{folder}' is no folder here; give one that transformers reads, or a Hub id")
    if folder.is_dir() and any(folder.glob("*.gguf")) and not _has_weights(folder):
        raise PalError(
            f"the LLM '{folder}' is a folder with GGUF files; give one of the files, such as {_first(folder)}"
        )
    if folder.is_dir() and any(folder.glob("pytorch_model*.bin")) and not _has_weights(folder):
        raise PalError(f"the LLM '{folder}' has its weights as pickle, which is not read; save them as safetensors")
    if folder.is_dir() and (folder / _ADAPTER).is_file():
        raise _adapter_error(folder)
    if folder.is_dir():
        _check_files(folder)


def _check_files(folder: Path) -> None:
    start = f"cannot load the LLM '{folder}'"
    if not (folder / "config.json").is_file():
        raise PalError(f"{start}: it is no LLM's folder, config.json is missing; give what save_pretrained wrote")
    if not _has_weights(folder):
        raise PalError(f"{start}: it has no weights (model.safetensors); copy them there, or give another folder")
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise PalError(f"{start}: {file.name} is a pointer of Git LFS, no weights; run 'git lfs pull' there")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    try:
        shards = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PalError(f"{start}: {index.name} is no index of weights; copy or download it again") from None
    for shard in shards:
        if not (folder / shard).is_file():
            raise PalError(f"{start}: {shard} is missing, which {index.name} names; copy or download it")


def more_layers(names: Iterable[str], own: Collection[str]) -> str | None:
    """First name of a weight that belongs to a decoder layer beyond the model's last one; None where there is none."""
    for name in sorted(names):
        if re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.0.", name, count=1) in own and name not in own:
            return name
    return None


def _first(folder: Path) -> Path:
    return min(folder.glob("*.gguf"))


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
