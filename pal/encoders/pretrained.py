"""What encoders share whose network is a class of transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pal.config import StrictConfig
from pal.encoders.base import Encoder
from pal.encoders.checkpoint import EncoderCheckpoint
from pal.errors import ConfigError


class PretrainedOptions(StrictConfig):
    """Where the network comes from: `path`, or `architecture`, or both."""

    path: str | None = None
    """Hub id, or local folder with safetensors."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    architecture: dict[str, Any] | None = None
    """Fields of the network's configuration in transformers. Where given, nothing is read from `path`: the network is
    built with random weights, for a caller that then loads its own."""

    def with_architecture(self, **fields: Any) -> Self:
        """The same options for a network of these sizes that is read from nowhere."""
        return self.model_copy(update={"path": None, "revision": None, "architecture": fields})


class PretrainedEncoder(Encoder):
    """An encoder around a network of transformers, which is its submodule `network`, in float32.

    Raises:
        ConfigError: neither `path` nor `architecture`, or a checkpoint that does not hold the network.
    """

    name: ClassVar[str]
    """As it is registered, for messages."""
    example: ClassVar[str]
    """A Hub id, for messages."""
    places: ClassVar[Mapping[str, str | None]]
    """`model_type` of a checkpoint -> the field of its config.json with the network's configuration; None: all."""
    part: ClassVar[str]
    """What the network is called within a larger model's checkpoint."""
    computed: ClassVar[tuple[str, ...]] = ()
    """Ends of names of tensors that the class fills itself, so that a checkpoint need not have them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.network = self._network(config)

    @classmethod
    @abstractmethod
    def classes(cls) -> tuple[Any, Any]:
        """The network's configuration and model classes; imported in here, since transformers takes a second."""

    def standalone_config(self) -> Any:
        """Options that build the same network without reading `path`, for bundles with all weights."""
        return self.config.model_copy(update={"architecture": self.network.config.to_diff_dict()})

    def _network(self, options: PretrainedOptions) -> Any:
        if options.architecture is None and options.path is None:
            raise ConfigError(f"encoder '{self.name}': missing key 'path'; give a Hub id such as {self.example}")
        configuration, network = self.classes()
        if options.architecture is not None:
            return network(configuration(**options.architecture))
        assert options.path is not None
        checkpoint = EncoderCheckpoint(self.name, options.path, options.revision)
        fields = checkpoint.fields(self.places)
        return checkpoint.load(network, configuration(**fields), part=self.part, computed=self.computed)
