"""The contract of connectors: encoder features in, features for the integration out."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from pal.types import AudioFeatures


class Connector(nn.Module, ABC):
    """Maps `AudioFeatures` to `AudioFeatures`; may change width, number of tokens and time scale.

    Constructed as `cls(config, in_width=E)`, or, if it takes several encoders, as `cls(config, in_widths=(E, ...))`.
    Padding must not influence real tokens.
    """

    n_encoders: int = 1
    """Number of encoders whose features it takes."""
    width: int
    """E of the output."""
    stride: int = 1
    """Tokens that become one."""
    reach: int | None = None
    """Tokens before and after its own that can change a token of the output; None: all of the clip's."""

    @abstractmethod
    def forward(self, *features: Any, **options: Any) -> AudioFeatures:
        """`AudioFeatures` [B, A, E_in] of each encoder -> [B, A', width], without waiting for the device."""
