"""Options of `from_pretrained`: revision on the Hub, dtype and device of the weights, a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pal.backbone.attention import NAME
from pal.errors import BundleError, PalError

HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options of downloads from the Hub."""
_WITHOUT_EFFECT = {
    *("trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "weights_only", "code_revision", "proxies"),
    *("_from_auto", "_from_pipeline", "_commit_hash", "subfolder"),
}
"""Options of transformers that change nothing here: no code is downloaded, and only safetensors are read."""
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoadOptions:
    """Options of `from_pretrained`, checked."""

    hub: dict[str, Any]
    """Options of downloads from the Hub."""
    dtype: torch.dtype | None
    """Dtype of all weights; None: as they were saved."""
    device: torch.device | None
    """Device of the model; None: the CPU."""
    adapter: str | None
    """Folder or Hub id of a PEFT adapter."""
    adapter_hub: dict[str, Any]
    """Options of the adapter's download from the Hub."""

    @classmethod
    def of(cls, dtype: torch.dtype | str | None, device_map: Any, kwargs: Mapping[str, Any]) -> LoadOptions:
        """Check the arguments of `from_pretrained`.

        Raises:
            PalError: an option that is not supported.
        """
        given = dict(kwargs)
        adapter = dict(given.pop("adapter_kwargs", None) or {})
        path = adapter.get("_adapter_model_path")
        old_dtype = given.pop("torch_dtype", None)
        if given.pop("attn_implementation", None) not in (None, NAME):
            raise PalError(f"attn_implementation must be '{NAME}', since others ignore audio; leave it out")
        other = [name for name, value in given.items() if name not in {*HUB, *_WITHOUT_EFFECT} and value is not None]
        if given.get("subfolder"):
            other.append("subfolder")
        for name in other:
            if name.startswith(("quantization", "load_in_")):
                raise PalError(f"from_pretrained: '{name}': quantised weights are not supported; give dtype='bfloat16'")
            raise PalError(f"from_pretrained: '{name}' is not supported; known: dtype, device_map, {', '.join(HUB)}")
        return cls(
            hub=_of_hub(given),
            dtype=_dtype(old_dtype if dtype is None else dtype),
            device=_device(device_map),
            adapter=None if path is None else str(path),
            adapter_hub=_of_hub(adapter),
        )


def load_adapter(model: nn.Module, path: str, hub: Mapping[str, Any], device: torch.device) -> None:
    """Load a PEFT adapter into a model and move both to `device`; only safetensors are read.

    Args:
        model: the model; its LLM or encoders get the adapter's layers.
        path: folder or Hub id of the adapter.
        hub: options of the download.
        device: device of the model.

    Raises:
        BundleError: no adapter in safetensors, or an adapter of another model.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["adapter_config.json", _ADAPTER], **hub))
    if not (folder / _ADAPTER).is_file():
        raise BundleError(f"{path}: the adapter has no {_ADAPTER}; save it again with PEFT")
    options = PeftConfig.from_pretrained(str(folder))
    options.inference_mode = True
    inject_adapter_in_model(options, model)
    weights = load_file(folder / _ADAPTER)
    found: Any = set_peft_model_state_dict(
        model, {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    )
    if found.unexpected_keys:
        first = sorted(found.unexpected_keys)[0]
        raise BundleError(f"{path}: an adapter of another model, with '{first}'; give an adapter of this model")
    model.requires_grad_(False).eval().to(device)


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in HUB and value is not None}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise PalError(f"dtype '{dtype}' is unknown; give torch.bfloat16, torch.float16, torch.float32 or 'auto'")
    return found


def _device(device_map: Any) -> torch.device | None:
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1:
            raise PalError(f"device_map names {len(devices)} devices, but a model is never split; give one device")
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise PalError(f"device_map '{device_map}': {str(error).splitlines()[0]}") from None
