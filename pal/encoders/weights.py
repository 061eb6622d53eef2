"""Read weights of encoders that transformers has no class for: a `config.json` and one safetensors file."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pal.errors import ConfigError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def read(path: str, revision: str | None, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read configuration and tensors from a folder or the Hub.

    Args:
        path: a folder with both files, or a Hub id.
        revision: branch, tag or commit on the Hub.
        where: encoder and source, for error messages.

    Raises:
        ConfigError: a file that is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _file(path, revision, CONFIG, where)
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{where}: {CONFIG} is no JSON; fetch it again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: {CONFIG} is no JSON object; fetch it again")
    file = _file(path, revision, WEIGHTS, where)
    try:
        return fields, load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{where}: {WEIGHTS} is damaged ({error}); fetch it again") from None


def check(network: nn.Module, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Select the tensors of `network`, in float32; all must be there, in the right shape.

    Tensors of other modules, such as a classifier, are left out. Unknown tensors of the network's own modules, such as
    further layers, are an error.

    Raises:
        ConfigError: a tensor that is missing, unknown or of another shape; the message names the first.
    """
    own = network.state_dict()
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise ConfigError(f"{where} lacks {len(missing)} of {len(own)} weights, such as '{missing[0]}'; fetch it again")
    parts = {name.split(".")[0] for name in own}
    unknown = sorted(name for name in set(tensors) - set(own) if name.split(".")[0] in parts)
    if unknown:
        raise ConfigError(
            f"{where} has {len(unknown)} weights that its configuration has no place for, such as '{unknown[0]}'; "
            "it is of another architecture"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"{where}: '{name}' has shape {tuple(tensors[name].shape)}, its configuration asks for "
                f"{tuple(tensor.shape)}; it is of another architecture"
            )
    return {name: tensors[name].float() for name in own}


def _file(path: str, revision: str | None, name: str, where: str) -> Path:
    if Path(path).is_dir():
        file = Path(path) / name
        if not file.is_file():
            raise ConfigError(f"{where} has no {name}; give a folder that `pal convert` wrote, or a Hub id")
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where} cannot be loaded ({reason}); give a Hub id or a folder") from None
