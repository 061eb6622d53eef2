"""Bundles: a model as a folder of safetensors, configuration and tokenizer, with digests checked on load.

A bundle holds the parts that were trained, or everything (`full`). What it leaves out it names by
source and SHA-256, so that it cannot be joined to another LLM or encoder by mistake.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pal.config import parse
from pal.errors import BundleError
from pal.files import MANIFEST, atomic_folder, recover, verify
from pal.model_config import LLMConfig, ModelConfig

if TYPE_CHECKING:
    from pal.model import PalModel

FORMAT = 2
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_ENCODERS = "ears.encoders."


def save(model: PalModel, folder: str | Path, full: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write `model` as a bundle, atomically.

    Args:
        model: any model.
        folder: where; a bundle already there is replaced.
        full: also write the parts that have a source of their own and were not trained.
        dtype: of floating-point weights on disk; they come back in the model's own.
    """
    state = model.state_dict()
    # By memory, not by name alone: tied weights have two names, of which only one was trained.
    ours = {tensor.data_ptr() for name, tensor in state.items() if full or _is_ours(model, name)}
    kept = {name: tensor for name, tensor in state.items() if tensor.data_ptr() in ours}
    description = {
        "format": FORMAT,
        "model": model.config.model_dump(mode="json"),
        "llm": model.llm.lm.config.to_dict(),
        "encoders": [
            {"name": part["name"], **model.ears.encoder(i).standalone_config().model_dump(mode="json")}
            for i, part in enumerate(model.config.encoders)
        ],
        "lora": None if model.llm.lora is None else model.llm.lora.model_dump(),
        "left_out": _left_out(model, set(kept)),
    }
    with atomic_folder(Path(folder)) as temporary:
        save_file({name: _for_disk(tensor, dtype) for name, tensor in kept.items()}, temporary / _WEIGHTS)
        (temporary / _CONFIG).write_text(json.dumps(description, indent=1, default=str) + "\n")
        model.tokenizer.save_pretrained(temporary)


def load(path: str | Path) -> PalModel:
    """Read a bundle, in evaluation mode on the CPU.

    Args:
        path: its folder, the folder of the training run that made it, or a Hub id.

    Raises:
        BundleError: missing, damaged, of another format, or its LLM is not the one it was made with.
    """
    from transformers import AutoTokenizer

    from pal.backbone.llm import LoRA
    from pal.model import PalModel

    folder = _folder(path)
    verify(folder)
    description, config = _describe(folder)
    weights = load_file(folder / _WEIGHTS)
    sources: dict[str, Any] = {}
    left_out = {_part_of(name) for name in description["left_out"]}
    # Where every weight of a part is here, only its shape is needed, not its source.
    if "llm" not in left_out:
        sources["llm"] = LLMConfig(fresh=description["llm"], dtype=config.llm.dtype)
    sources["encoders"] = [
        given if f"{_ENCODERS}{i}" in left_out else alone
        for i, (given, alone) in enumerate(zip(config.encoders, description["encoders"], strict=True))
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = PalModel.from_config(config.model_copy(update=sources), tokenizer)
    model.config = config
    if description["lora"]:
        model.llm.add_lora(parse(LoRA, description["lora"], where=f"bundle {folder}"))
    _fill(model, weights, description["left_out"], folder)
    model.source = str(path) if folder.name != "tiny" else "tiny"
    return model.eval()


def shape_of(path: str | Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """What a bundle on this machine is made of, so that it could be built with other weights; and its LoRA options.

    Raises:
        BundleError: no bundle, or one of another format.
    """
    if not Path(path).exists():
        raise BundleError(f"{path}: no such folder; give one that save_pretrained wrote")
    description, config = _describe(_folder(path))
    llm = LLMConfig(fresh=description["llm"], dtype=config.llm.dtype)
    return config.model_copy(update={"llm": llm, "encoders": description["encoders"]}), description["lora"]


def _describe(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """All of a bundle's configuration, and the part that a recipe would have."""
    description = json.loads((folder / _CONFIG).read_text())
    if description.get("format") != FORMAT:
        raise BundleError(
            f"{folder}: format {description.get('format')}, this version reads {FORMAT}; upgrade pal-audio"
        )
    return description, parse(ModelConfig, description["model"], where=f"bundle {folder}")


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        recover(candidate)
        if (candidate / MANIFEST).is_file():
            return candidate
    if folder.exists() or not _is_hub_id(str(path)):
        raise BundleError(
            f"{path}: not a bundle (no {MANIFEST}); give a folder that save_pretrained wrote, or a Hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: no such folder, and the Hub did not give it ({reason})") from None


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(part and part.replace("-", "").replace("_", "").replace(".", "") for part in parts)


def _part_of(name: str) -> str:
    """`llm`, `ears.encoders.0`, ...: what has a source of its own."""
    return ".".join(name.split(".")[: 3 if name.startswith(_ENCODERS) else 1])


def _is_ours(model: PalModel, name: str) -> bool:
    """Whether the tensor exists nowhere else: made or trained here."""
    if _part_of(name) == "llm":
        return model.config.llm.path is None or name in model.trained or "lora_" in name
    if name.startswith(_ENCODERS):
        part = _part_of(name)
        options = model.config.encoders[int(part.removeprefix(_ENCODERS))]
        return "path" not in options or any(n.startswith(f"{part}.") for n in model.trained)
    return True


def _left_out(model: PalModel, kept: set[str]) -> dict[str, str]:
    """Name and SHA-256 of each tensor that the bundle does not hold."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items() if name not in kept}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # A copy, because safetensors refuses tensors that share memory, such as tied embeddings.
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).clone().contiguous()


def _fill(model: nn.Module, weights: dict[str, Tensor], left_out: dict[str, str], folder: Path) -> None:
    own: dict[str, Any] = model.state_dict()
    missing = set(own) - set(weights) - set(left_out)
    unknown = set(weights) - set(own)
    if missing or unknown:
        name = sorted(missing or unknown)[0]
        raise BundleError(f"{folder}: its weights do not fit its configuration (first: '{name}'); save it again")
    for name, expected in left_out.items():
        if digest(own[name]) != expected:
            raise BundleError(
                f"{folder}: '{name}' of the LLM or encoder found is not the one this bundle was made with; "
                "give the same revision"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            if own[name].shape != tensor.shape:
                raise BundleError(f"{folder}: '{name}' has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
            own[name].copy_(tensor)
