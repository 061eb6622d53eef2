"""The contract of connectors: what lies between an encoder and an integration."""

from abc import ABC, abstractmethod

from torch import nn

from pal.types import AudioFeatures


class Connector(nn.Module, ABC):
    """Maps `AudioFeatures` to `AudioFeatures`; may change width, number of tokens and time scale.

    Constructed as `cls(config, in_width=E)`. Masked-out tokens must not influence real ones.
    """

    width: int
    """E of what comes out."""

    @abstractmethod
    def forward(self, features: AudioFeatures) -> AudioFeatures:
        """[B, A, E_in] -> [B, A', width]."""
