"""GGUF files as LLMs: configuration, tokenizer and dequantised weights, by transformers' own reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pal.errors import PalError, first_sentence

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_NAME = "model.gguf"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens: transformers' name -> GGUF's."""
_REMEDY = "copy or download it again, or give the safetensors it was made from"


def is_gguf(source: object) -> bool:
    """Whether an LLM's source is the path of a GGUF file."""
    return isinstance(source, (str, Path)) and str(source).endswith(_SUFFIX) and not Path(source).is_dir()


def read_config(file: str | Path) -> PreTrainedConfig:
    """The configuration of the LLM in a file.

    Raises:
        PalError: no such file, not GGUF, an architecture that transformers does not read from GGUF, or the package
            `gguf` is not installed.
    """
    with _alone(file) as folder:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=_NAME)
    return config


def read_tokenizer(file: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a file, with its chat template.

    Raises:
        PalError: as `read_config`.
    """
    with _alone(file) as folder:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=_NAME)
        special = _special_ids(folder)
    # transformers 5.17 takes one token for all of them, and cleans decoded text up
    for name in [name for name in tokenizer.init_kwargs if name.endswith("_token_id") or name == "name_or_path"]:
        del tokenizer.init_kwargs[name]
    for name, number in special.items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.name_or_path = str(file)
    return tokenizer


def load(cls: Any, file: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a file with dequantised weights, and the report of loading.

    Args:
        cls: transformers' class of the model.
        file: the GGUF file.
        options: options of `from_pretrained`.

    Raises:
        PalError: as `read_config`.
    """
    from transformers import GgufConfig

    with _alone(file) as folder:
        model, report = cls.from_pretrained(
            folder,
            gguf_file=_NAME,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    # Its weights are plain tensors now, but some versions of transformers still take it for a quantised model, which
    # they neither save nor train.
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    return model, report


def _special_ids(folder: str) -> dict[str, int]:
    """Ids of the special tokens that the file names, by their names in transformers."""
    from gguf import GGUFReader

    reader, found = GGUFReader(Path(folder) / _NAME), {}
    for ours, theirs in _SPECIAL.items():
        field = reader.get_field(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            found[ours] = int(field.contents())
    return found


@contextmanager
def _alone(file: str | Path) -> Iterator[str]:
    """Context manager of a folder that holds nothing but a link to the file.

    In the file's own folder, transformers would also read a tokenizer.json or adapter_config.json beside it.

    Raises:
        PalError: the file cannot be read, in the block either.
    """
    file = Path(file)
    _check(file)
    with TemporaryDirectory(prefix="pal-gguf-") as folder:
        (Path(folder) / _NAME).symlink_to(file.resolve())
        try:
            yield folder
        except Exception as error:  # each kind of damage raises another
            raise PalError(f"cannot read the GGUF file '{file}': {first_sentence(error)}; {_REMEDY}") from None


def _check(file: Path) -> None:
    if not file.is_file():
        raise PalError(f"the LLM '{file}' is no file here; give a GGUF file, an LLM's folder or a Hub id")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise PalError(f"the LLM '{file}' is no GGUF file, whatever its name; copy or download it again")
    if find_spec("gguf") is None:
        raise PalError(f"the LLM '{file}' is GGUF, which needs a package: pip install 'pal-audio[gguf]'")
