"""One network out of a checkpoint that may hold much more, from a Hub id or a folder, safetensors only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class EncoderCheckpoint:
    """Where an encoder's weights are. Every error is a ConfigError of one line that says so."""

    encoder: str
    """The registered name, for messages."""
    path: str
    """Hub id or folder."""
    revision: str | None
    """Branch, tag or commit on the Hub."""

    def fields(self, places: Mapping[str, str | None]) -> dict[str, Any]:
        """The network's configuration.

        Args:
            places: for each `model_type` that can be read, the field of config.json that holds the
                network's configuration, or None where it is the whole of it.
        """
        from transformers import PreTrainedConfig

        try:
            fields, _ = PreTrainedConfig.get_config_dict(self.path, revision=self.revision)
        except OSError as error:
            raise self._unreadable(error) from None
        found = fields.get("model_type", "none")
        if found not in places:
            wanted = " or ".join(f"'{name}'" for name in places)
            raise self._error(f"holds no model of type {wanted} (found: {found}); give a Hub id or a folder")
        place = places[found]
        return fields if place is None else dict(fields.get(place) or {})

    def load(self, network: Any, config: Any, part: str, computed: tuple[str, ...] = ()) -> Any:
        """The network in float32, in evaluation mode.

        Only its own tensors are read, and only the files that hold some of them are fetched.

        Args:
            network: a model class of transformers.
            config: its configuration.
            part: what the network is called inside of a larger model; `part.x` and `model.part.x` are
                then its tensor `x`. Where no tensor has such a name, the checkpoint is the network.
            computed: last parts of names that need not be there, because the class fills them itself.
        """
        from safetensors import SafetensorError

        try:
            tensors = self._tensors(part)
        except (OSError, SafetensorError, ValueError, KeyError) as error:  # the last two: a damaged index
            raise self._unreadable(error) from None
        model, report = network.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are an error below, in one line
            output_loading_info=True,
        )
        missing = sorted(name for name in report["missing_keys"] if not name.endswith(computed))
        if missing:
            raise self._error(f"lacks {len(missing)} weights of the encoder, such as {missing[0]}; fetch it again")
        if report["mismatched_keys"]:
            name = sorted(key[0] for key in report["mismatched_keys"])[0]
            raise self._error(f"has '{name}' in another shape than its config.json says; fetch it again")
        return model

    def _tensors(self, part: str) -> dict[str, Tensor]:
        from safetensors import safe_open

        files = self._files()
        own = _own_names(files, part)
        tensors = {}
        for file in sorted({files[name] for name in own}):
            with safe_open(self._file(file), framework="pt") as reader:
                for name in own:
                    if files[name] == file:
                        tensors[own[name]] = reader.get_tensor(name)
        return tensors

    def _files(self) -> dict[str, str]:
        """Name of each tensor -> the file that holds it."""
        from safetensors import safe_open

        try:
            index = self._file(_INDEX)
        except OSError:  # one file then
            with safe_open(self._file(_WEIGHTS), framework="pt") as reader:
                return dict.fromkeys(reader.keys(), _WEIGHTS)
        return dict(json.loads(Path(index).read_text())["weight_map"])

    def _file(self, name: str) -> str:
        from transformers.utils import cached_file

        found = cached_file(self.path, name, revision=self.revision)
        assert found is not None  # it raises
        return found

    def _unreadable(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split())[:200]
        return self._error(f"cannot be loaded ({reason}); give a Hub id or a folder with safetensors")

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"encoder '{self.encoder}': {self.path} {message}")


def _own_names(files: Mapping[str, str], part: str) -> dict[str, str]:
    """Name in the checkpoint -> name in the network, of the tensors of `part`, or of all where there is none."""
    split = {name: f".{name}".partition(f".{part}.") for name in files}
    inside = {name: rest for name, (_, found, rest) in split.items() if found}
    return inside or {name: name for name in files}
