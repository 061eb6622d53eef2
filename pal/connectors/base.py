"""The contract of connectors: what lies between an encoder and an integration."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from pal.types import AudioFeatures


class Connector(nn.Module, ABC):
    """Maps `AudioFeatures` to `AudioFeatures`; may change width, number of tokens and time scale.

    Constructed as `cls(config, in_width=E)`, or, where it takes several encoders, as `cls(config, in_widths=(E, ...))`.
    Masked-out tokens must not influence real ones.
    """

    n_encoders: int = 1
    """Number of encoders whose features it takes."""
    width: int
    """E of what comes out."""

    @abstractmethod
    def forward(self, *features: Any, **options: Any) -> AudioFeatures:
        """`AudioFeatures` [B, A, E_in], as many as `takes` -> [B, A', width]; no tensor is read, lengths are known."""
