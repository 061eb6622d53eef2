"""Base class of encoders that wrap a transformers network, and its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pal.config import StrictConfig
from pal.encoders.base import Encoder
from pal.encoders.checkpoint import EncoderCheckpoint
from pal.errors import ConfigError


class PretrainedOptions(StrictConfig):
    """Source of the network: `path`, or `architecture`, or both."""

    path: str | None = None
    """Hub id, or local folder with safetensors, or the name of a known model (`pal.pretrained`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    architecture: dict[str, Any] | None = None
    """Fields of the network's configuration in transformers. If given, `path` is not read: the network is built with
    random weights, for callers that load weights afterwards."""

    def with_architecture(self, **fields: Any) -> Self:
        """These options for a network of the given sizes with random weights."""
        return self.model_copy(update={"path": None, "revision": None, "architecture": fields})


class PretrainedEncoder(Encoder):
    """Encoder around a transformers network, the submodule `network`, in float32.

    Raises:
        ConfigError: neither `path` nor `architecture`, or a checkpoint without the network.
    """

    name: ClassVar[str]
    """Registered name, for error messages."""
    example: ClassVar[str]
    """Hub id of a checkpoint, for error messages."""
    config_keys: ClassVar[Mapping[str, str | None]]
    """Key of config.json with the network's configuration, by the checkpoint's `model_type`; None: the whole file."""
    submodule: ClassVar[str]
    """Name of the network within the checkpoint of a larger model."""
    computed: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of tensors that the class computes, so that checkpoints may lack them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.network = self._network(config)

    @classmethod
    @abstractmethod
    def classes(cls) -> tuple[Any, Any]:
        """Configuration and model class of the network; imported in this method, since transformers takes a second."""

    def standalone_config(self) -> Any:
        """Options that build the same network without reading `path`, for bundles that contain all weights."""
        return self.config.model_copy(update={"architecture": self.network.config.to_diff_dict()})

    def _network(self, options: PretrainedOptions) -> Any:
        if options.architecture is None and options.path is None:
            raise ConfigError(f"encoder '{self.name}': missing key 'path'; give a Hub id such as {self.example}")
        configuration, network = self.classes()
        if options.architecture is not None:
            return network(configuration(**options.architecture))
        assert options.path is not None
        checkpoint = EncoderCheckpoint(self.name, options.path, options.revision)
        fields = checkpoint.fields(self.config_keys)
        return checkpoint.load(network, configuration(**fields), submodule=self.submodule, computed=self.computed)
