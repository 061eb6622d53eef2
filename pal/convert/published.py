"""Published checkpoints of SSLAM, EAT and BEATs, in files of `torch.save`.

No other module opens a `.pt` file. It is loaded with `weights_only`, so that no code in it can run; a checkpoint that
needs more is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pal.config import StrictConfig, parse
from pal.convert.folder import Converted
from pal.encoders import beats, sslam, weights
from pal.errors import ConfigError


def read_sslam(source: Path) -> Converted:
    """The encoder of a fairseq checkpoint of EAT or SSLAM, pre-trained or fine-tuned, in the layout on the Hub.

    Raises:
        ConfigError: the file is damaged or of another layout.
    """
    checkpoint = _load(source)
    sizes, tensors = _sslam(checkpoint, str(source))
    return _converted(checkpoint, sizes, tensors)


def read_beats(source: Path) -> Converted:
    """The encoder of an official checkpoint of BEATs, pre-trained or fine-tuned.

    Raises:
        ConfigError: the file is damaged or of another layout.
    """
    checkpoint = _load(source)
    sizes, tensors = _beats(checkpoint, str(source))
    return _converted(checkpoint, sizes, tensors)


def _converted(checkpoint: dict[str, Any], sizes: StrictConfig, tensors: dict[str, Tensor]) -> Converted:
    return Converted(sizes.model_dump(mode="json"), tensors, left_out=len(checkpoint["model"]) - len(tensors))


def _load(source: Path) -> dict[str, Any]:
    """The checkpoint, with the tensors by name in "model". Raises ConfigError if it is invalid or unsafe to load."""
    if not source.is_file():
        raise ConfigError(f"{source}: no such file; give the checkpoint as it was published")
    try:
        with warnings.catch_warnings():
            # the errors below replace torch's warnings
            warnings.simplefilter("ignore")
            found = torch.load(source, map_location="cpu", weights_only=True)
    # An invalid or truncated file can raise any exception.
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ConfigError(
                f"{source}: holds an object of {refused[1]}, not only weights, and loading it could run code; where "
                "it comes from, save it anew with only 'cfg' and 'model' in plain dictionaries"
            ) from None
        raise ConfigError(f"{source}: not a file of torch.save, or damaged; fetch it again") from None
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict):
        keys = ", ".join(sorted(map(str, found))[:5]) if isinstance(found, dict) else type(found).__name__
        raise ConfigError(
            f"{source}: has no dictionary 'model' (found: {keys}); give the checkpoint as it was published"
        )
    return found | {"model": {str(name): tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}}


def _sslam(checkpoint: dict[str, Any], where: str) -> tuple[StrictConfig, dict[str, Tensor]]:
    image = "modality_encoders.IMAGE."
    renamed = {}
    for name, tensor in checkpoint["model"].items():
        # a fine-tuned checkpoint has the pre-trained model as its submodule `model`
        name = name.removeprefix("model.").removeprefix(image)
        renamed[name.replace("context_encoder.norm.", "pre_norm.")] = tensor
    shapes = {
        "local_encoder.proj.weight": (f"{image}local_encoder.proj.weight", 4),
        "fixed_positional_encoder.positions": (f"{image}fixed_positional_encoder.positions", 3),
        "blocks.0.mlp.fc1.weight": ("blocks.0.mlp.fc1.weight", 2),
    }
    for name, (published, axes) in shapes.items():
        if name not in renamed or renamed[name].ndim != axes:
            raise _lacks(where, f"'{published}'")
    width, _, patch, _ = renamed["local_encoder.proj.weight"].shape
    found = {
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in renamed if name.startswith("blocks.")}),
        "num_heads": _heads(checkpoint, width),
        "mlp_ratio": len(renamed["blocks.0.mlp.fc1.weight"]) / width,
        "patch_size": patch,
    }
    sizes = parse(sslam.SslamArchitecture, found, where)
    published_names = {
        **{f"{part}.": f"{image}{part}." for part in ("local_encoder", "fixed_positional_encoder")},
        "extra_tokens": f"{image}extra_tokens",
        "pre_norm.": f"{image}context_encoder.norm.",
    }
    own = _checked(sslam.SslamNetwork, sizes, sslam.own_layout(renamed, sizes), where, published_names)
    return sizes, {sslam.PREFIX + name: tensor for name, tensor in own.items()}


def _heads(checkpoint: dict[str, Any], width: int) -> int:
    """Number of attention heads by a checkpoint's configuration; without one, heads are 64 wide, as in ViT."""
    fields = checkpoint.get("cfg")
    model = fields.get("model") if isinstance(fields, dict) else None
    heads = model.get("num_heads") if isinstance(model, dict) else None
    return heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else max(1, width // 64)


def _beats(checkpoint: dict[str, Any], where: str) -> tuple[StrictConfig, dict[str, Tensor]]:
    fields = checkpoint.get("cfg")
    if not isinstance(fields, dict):
        raise _lacks(where, "the dictionary 'cfg'")
    if "patch_embedding.weight" not in checkpoint["model"]:
        raise _lacks(where, "'patch_embedding.weight'")
    if any(name.startswith("quantize.") for name in checkpoint["model"]):
        raise ConfigError(f"{where}: is a tokenizer of BEATs; give the checkpoint of a model")
    # The official code's defaults for keys missing in cfg; they differ from the values of the published models.
    defaults = {"deep_norm": False, "max_distance": 1280, "relative_position_embedding": False, "gru_rel_pos": False}
    fields = defaults | fields
    beats.check_kind(fields, where)
    known = {name: value for name, value in fields.items() if name in beats.BeatsArchitecture.model_fields}
    sizes = parse(beats.BeatsArchitecture, known, f"{where}: cfg")
    return sizes, _checked(beats.BeatsNetwork, sizes, beats.own_layout(checkpoint["model"], where), where, {})


def _checked(
    network: Callable[[Any], nn.Module],
    sizes: StrictConfig,
    tensors: dict[str, Tensor],
    where: str,
    published: dict[str, str],
) -> dict[str, Tensor]:
    """The network's tensors, checked by name and shape; `published` maps prefixes to the checkpoint's, for errors."""
    with torch.device("meta"):
        empty = network(sizes)
    missing = [name for name in empty.state_dict() if name not in tensors]
    for at, name in enumerate(missing):
        for ours, theirs in published.items():
            if name.startswith(ours):
                missing[at] = theirs + name.removeprefix(ours)
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise _lacks(where, f"{shown}{more}")
    return weights.check(empty, tensors, where)


def _lacks(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: lacks {what}; is it of another layout? known: beats, sslam")
