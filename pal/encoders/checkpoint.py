"""Load an encoder's network from a checkpoint of it, or of a larger model; safetensors only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal.errors import ConfigError
from pal.pretrained import remedy, source_of

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class EncoderCheckpoint:
    """Location of an encoder's pretrained weights. All errors are `ConfigError`s that name it."""

    encoder: str
    """Registered name of the encoder, for error messages."""
    path: str
    """Hub id or folder, or the name of a known model."""
    revision: str | None
    """Branch, tag or commit on the Hub."""

    def fields(self, config_keys: Mapping[str, str | None]) -> dict[str, Any]:
        """Fields of the network's configuration.

        Args:
            config_keys: for each supported `model_type`, the key of config.json that holds the network's
                configuration; None: the whole file.
        """
        from transformers import PreTrainedConfig

        try:
            fields, _ = PreTrainedConfig.get_config_dict(self._source, revision=self.revision)
        except OSError as error:
            raise self._unreadable(error) from None
        found = fields.get("model_type", "none")
        if found not in config_keys:
            wanted = " or ".join(f"'{name}'" for name in config_keys)
            raise self._error(f"holds no model of type {wanted} (found: {found}); give a Hub id or a folder")
        key = config_keys[found]
        return fields if key is None else dict(fields.get(key) or {})

    def load(self, network: Any, config: Any, submodule: str, computed: tuple[str, ...] = ()) -> Any:
        """Load the network in float32, in evaluation mode.

        Only its own tensors are read, and only the files that contain them are downloaded.

        Args:
            network: a model class of transformers.
            config: its configuration.
            submodule: name of the network within a larger model: tensors `{submodule}.x` and `model.{submodule}.x` are
                loaded as `x`. If no tensor has such a name, all tensors are the network's.
            computed: endings of the names of tensors that may be missing, because the class computes them.
        """
        from safetensors import SafetensorError

        try:
            tensors = self._tensors(submodule)
        except (OSError, SafetensorError, ValueError, KeyError) as error:  # ValueError and KeyError: a damaged index
            raise self._unreadable(error) from None
        model, report = network.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
        missing = sorted(name for name in report["missing_keys"] if not name.endswith(computed))
        if missing:
            raise self._error(f"lacks {len(missing)} weights of the encoder, such as {missing[0]}; fetch it again")
        if report["mismatched_keys"]:
            name = sorted(key[0] for key in report["mismatched_keys"])[0]
            raise self._error(f"has '{name}' in another shape than its config.json says; fetch it again")
        return model

    def _tensors(self, submodule: str) -> dict[str, Tensor]:
        from safetensors import safe_open

        files = self._files()
        own = _own_names(files, submodule)
        tensors = {}
        for file in sorted({files[name] for name in own}):
            with safe_open(self._file(file), framework="pt") as reader:
                for name in own:
                    if files[name] == file:
                        tensors[own[name]] = reader.get_tensor(name)
        return tensors

    def _files(self) -> dict[str, str]:
        """File of each tensor, by the tensor's name."""
        from safetensors import safe_open

        try:
            index = self._file(_INDEX)
        except OSError:  # not sharded: all tensors are in one file
            with safe_open(self._file(_WEIGHTS), framework="pt") as reader:
                return dict.fromkeys(reader.keys(), _WEIGHTS)
        return dict(json.loads(Path(index).read_text())["weight_map"])

    def _file(self, name: str) -> str:
        from transformers.utils import cached_file

        found = cached_file(self._source, name, revision=self.revision)
        assert found is not None  # it raises if there is no such file
        return found

    def _unreadable(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split())[:200]
        advice = remedy(self.path) or "; give a Hub id or a folder with safetensors"
        return self._error(f"cannot be loaded ({reason}){advice}")

    @property
    def _source(self) -> str:
        return source_of(self.path, self.revision)

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"encoder '{self.encoder}': {self.path} {message}")


def _own_names(files: Mapping[str, str], submodule: str) -> dict[str, str]:
    """Name in the checkpoint -> name in the network, of the submodule's tensors, or of all if it has none."""
    split = {name: f".{name}".partition(f".{submodule}.") for name in files}
    inside = {name: rest for name, (_, found, rest) in split.items() if found}
    return inside or {name: name for name in files}
