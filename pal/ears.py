"""`Ears`: encoders and connectors, from waveforms to streams of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pal.audio import resample
from pal.connectors.base import Connector
from pal.encoders.base import Encoder
from pal.errors import ConfigError
from pal.integrations.routed import Stream
from pal.model_config import ModelConfig, Part
from pal.registry import build, check, lookup
from pal.transfer import to_device
from pal.types import AudioFeatures, Heard


class Ears(nn.Module):
    """Any number of encoders, each with a connector of its own or several fused by one.

    What a connector gives is a stream; each stream has its own way into the LLM.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(build("encoder", part) for part in config.encoders)
        self.connectors = nn.ModuleList()
        self.takes: list[list[int]] = []
        """For each connector, the numbers of the encoders that it takes."""
        self.streams: list[Stream] = []
        for part, takes in _connections(config):
            widths = [self.encoder(i).width for i in takes]
            context: dict[str, Any] = {"in_width": widths[0]} if len(takes) == 1 else {"in_widths": tuple(widths)}
            connector: Connector = build("connector", part, **context)
            self.connectors.append(connector)
            self.takes.append(takes)
            names = tuple(config.encoders[i]["name"] for i in takes)
            self.streams.append(Stream(width=connector.width, encoders=names))
        self.sampling_rate = max(self.encoder(i).sampling_rate for i in range(len(self.encoders)))
        """Hz of the waveforms: the highest of the encoders'; those with a lower one are given less."""

    def encoder(self, index: int) -> Encoder:
        """One of the encoders."""
        encoder: Any = self.encoders[index]  # or PEFT's copy of one, which has all that it has
        found: Encoder = encoder
        return found

    def hear(self, waveforms: list[Tensor]) -> list[AudioFeatures]:
        """Waveforms [N] at `sampling_rate`, one a clip -> what each encoder makes of them, [B, A, E]."""
        return [self.hear_with(i, waveforms) for i in range(len(self.encoders))]

    def hear_with(self, index: int, waveforms: list[Tensor]) -> AudioFeatures:
        """The same with one of the encoders."""
        encoder = self.encoder(index)
        if encoder.sampling_rate != self.sampling_rate:
            waveforms = [resample(samples_N, self.sampling_rate, encoder.sampling_rate) for samples_N in waveforms]
        return encoder.encode(waveforms)

    def recall(self, clips: Sequence[Heard]) -> list[AudioFeatures]:
        """Clips that these encoders heard before -> the features [B, A, E] that `hear` gives of their waveforms."""
        features = []
        for i in range(len(self.encoders)):
            encoder = self.encoder(i)
            x_BAE = pad_sequence([clip.x_AE[i] for clip in clips], batch_first=True)
            lengths = tuple(len(clip.x_AE[i]) for clip in clips)
            device = next(encoder.parameters()).device
            features.append(AudioFeatures(to_device(x_BAE, device), lengths, encoder.seconds_per_token))
        return features

    def connect(self, heard: list[AudioFeatures]) -> list[AudioFeatures]:
        """What the encoders made -> the features of each stream, [B, A, E]."""
        streams = []
        for connector, takes in zip(self.connectors, self.takes, strict=True):
            streams.append(connector(*(heard[i] for i in takes)))
        return streams


def check_ears(config: ModelConfig) -> None:
    """Raises ConfigError for a fault in encoders and connectors, before anything is built."""
    for part in config.encoders:
        check("encoder", part)
    for part, _ in _connections(config):
        check("connector", part)


def _connections(config: ModelConfig) -> list[tuple[Part, list[int]]]:
    """Each connector, and the numbers of the encoders that it takes."""
    count = len(config.encoders)
    if not isinstance(config.connector, list):
        takes = _takes(config.connector)
        if takes == 1:
            return [(config.connector, [i]) for i in range(count)]
        return [_checked(config.connector, list(range(count)))]
    found = []
    for place, part in enumerate(config.connector):
        options = dict(part)
        takes = options.pop("encoders", [place])
        if not isinstance(takes, list) or not all(isinstance(i, int) for i in takes):
            raise ConfigError(f"connector '{part.get('name')}': 'encoders' takes a list of numbers, such as [0, 2]")
        found.append(_checked(options, takes))
    used = [i for _, takes in found for i in takes]
    if sorted(set(used)) != list(range(count)):
        raise ConfigError(
            f"connectors take the encoders {used}, but there are {count}, counted from 0; each must be taken by one"
        )
    return found


def _checked(part: Part, takes: list[int]) -> tuple[Part, list[int]]:
    if len(takes) != _takes(part):
        raise ConfigError(f"connector '{part['name']}' takes {_takes(part)} encoders, not {len(takes)}")
    return part, takes


def _takes(part: Part) -> int:
    connector: type[Connector] = lookup("connector", part.get("name", ""))
    return connector.takes
