"""An LLM in a GGUF file, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pal.backbone.loading import load_lm
from pal.backbone.sources import load_tokenizer
from pal.convert.folder import Converted
from pal.errors import ConfigError

_SMALLER = (torch.bfloat16, torch.float16)


def read_llm(source: Path) -> Converted:
    """The LLM of a GGUF file: dequantised weights, tokenizer with chat template, generation configuration.

    The weights are stored in the smallest float type that holds every value exactly, which is float32 for quantised
    files: a value of Q4_1 is a 4-bit number times one float16 number plus another. So the folder and the file give the
    same weights, and a bundle made with one loads with the other.

    Raises:
        ConfigError: the file's name does not end in .gguf.
        PalError: no GGUF file, or an LLM of an unsupported family.
    """
    if source.suffix != ".gguf":
        raise ConfigError(f"{source}: the name of a GGUF file ends in .gguf; give such a file")
    lm = load_lm(source, None, torch.float32)
    tokenizer = load_tokenizer(str(source))
    tied = lm.config.tie_word_embeddings
    tensors = {name: tensor for name, tensor in lm.state_dict().items() if not (tied and name == "lm_head.weight")}
    dtype = exact_dtype(tensors.values())
    # transformers' own save_pretrained would look for the classes of this package
    config = {
        **lm.config.to_dict(),
        "architectures": [type(lm).__name__],
        "dtype": str(dtype).removeprefix("torch."),
    }
    config.pop("_model_name_or_path", None)  # the title in the file
    return Converted(
        config,
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        left_out=0,
        others=(tokenizer.save_pretrained, lm.generation_config.save_pretrained),
    )


def exact_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The smallest of bfloat16, float16 and float32 that holds all values of float32 tensors exactly."""
    remaining = list(_SMALLER)
    for tensor in tensors:
        remaining = [dtype for dtype in remaining if torch.equal(tensor.to(dtype).float(), tensor)]
        if not remaining:
            return torch.float32
    return remaining[0] if remaining else torch.float32
