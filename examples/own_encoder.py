"""An encoder from outside the package: registered by its decorator, used by name.

    python examples/own_encoder.py

In an installed package of your own, two lines in `pyproject.toml` let `pal train` and other commands find it, too:

    [project.entry-points."pal.encoders"]
    bands = "my_package.bands"
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

import pal
from pal.config import StrictConfig
from pal.encoders.base import Encoder
from pal.registry import register
from pal.types import AudioFeatures


@register("encoder", "bands")
class Bands(Encoder):
    """A token is the log power of some frequency bands over 40 ms, after one linear layer."""

    class Config(StrictConfig):
        """Options of the encoder `bands`."""

        bands: int = Field(default=16, ge=1)
        """Number of bands of equal width between 0 Hz and half the sampling rate."""
        width: int = 32
        """E, the width of a token."""

    sampling_rate = 16_000
    seconds_per_token = 0.04

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.project = nn.Linear(config.bands, config.width)

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples [N] at 16 kHz -> log10 power [ceil(N / 640), bands]."""
        frames_FN = nn.functional.pad(samples_N, (0, -len(samples_N) % 640)).unflatten(0, (-1, 640))
        power_FX = torch.fft.rfft(frames_FN)[:, 1:].abs().square() / 640
        bands_FM = torch.stack([band.mean(1) for band in power_FX.tensor_split(self.config.bands, dim=1)], dim=1)
        return bands_FM.clamp_min(1e-8).log10()

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """One token a frame [W, F, E]."""
        return AudioFeatures(self.project(frames_WFM), tuple(lengths), self.seconds_per_token)


def main() -> None:
    """Attach it to the small text LLM that ships with the package. It is untrained, so the answer means nothing yet."""
    model = pal.attach(llm=str(pal.TEXT_LLM), encoders=[{"name": "bands", "bands": 24}], integration="lal")
    second = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    (answer,) = model.ask_detailed((second, 16_000), "What sound is this?", max_new_tokens=8)
    print(f"{answer.audio_tokens} tokens of {answer.audio_seconds_used:g} s; untrained, it says: {answer.text!r}")


if __name__ == "__main__":
    main()
