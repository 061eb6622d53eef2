"""`AudioTower`: encoders and connectors, from waveforms to streams of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pal.audio import resample
from pal.clips import LONG_SECONDS, ClipBatch, Clips
from pal.connectors.base import Connector
from pal.encoders.base import Encoder
from pal.encoders.stream import EncoderStream
from pal.errors import ConfigError, PalError
from pal.integrations.routed import Stream
from pal.model_config import ModelConfig, Part
from pal.registry import build, check, lookup
from pal.transfer import to_device
from pal.types import AudioFeatures, EncodedClip, Frames, PreparedClips, waveform_seconds

BLOCK_SECONDS = 30
"""Audio that is encoded at once, of a clip of more than `LONG_SECONDS`."""


class AudioTower(nn.Module):
    """Audio encoders and their connectors: one connector for each encoder, or one that fuses several.

    Each connector's output is a stream; each stream has its own route into the LLM.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(build("encoder", part) for part in config.encoders)
        self.connectors = nn.ModuleList()
        self.encoder_indices: list[list[int]] = []
        """For each connector, the indices of its encoders."""
        self.streams: list[Stream] = []
        for part, indices in _connections(config):
            widths = [self.encoder(i).width for i in indices]
            context: dict[str, Any] = {"in_width": widths[0]} if len(indices) == 1 else {"in_widths": tuple(widths)}
            connector: Connector = build("connector", part, **context)
            self.connectors.append(connector)
            self.encoder_indices.append(indices)
            names = tuple(config.encoders[i]["name"] for i in indices)
            self.streams.append(Stream(width=connector.width, encoders=names))
        self.sampling_rate = max(self.encoder(i).sampling_rate for i in range(len(self.encoders)))
        """Rate of the waveforms in Hz: the highest of the encoders' rates. Waveforms are resampled for the others."""

    def encoder(self, index: int) -> Encoder:
        """The encoder at an index."""
        encoder: Any = self.encoders[index]  # or PEFT's wrapper, which has the same attributes
        found: Encoder = encoder
        return found

    def prepare(self, clips: Clips) -> PreparedClips:
        """Preprocess waveforms [N] at `sampling_rate`, or encoded clips, for `encode`.

        Runs on the host, in any thread: makes front-end frames or padded features, in pinned memory if the encoders are
        on a CUDA device.

        Raises:
            PalError: the widths of encoded clips are not those of the encoders.
        """
        batch = ClipBatch.of(clips)
        if batch.prepared is not None:
            return batch.prepared
        assert not batch.indexed, "a clip given as keys and values has no encoder input"
        self._check(batch.encoded)
        parts: list[Frames | AudioFeatures] = []
        for i in range(len(self.encoders) if len(clips) else 0):
            encoder = self.encoder(i)
            if batch.encoded:
                parts.append(_padded(encoder, [clip.x_AE[i] for clip in batch.encoded]))
            else:
                parts.append(self.prepare_with(i, batch.waveforms))
        return PreparedClips(tuple(parts), len(clips))

    def prepare_with(self, index: int, waveforms: Sequence[Tensor]) -> Frames:
        """Front-end frames of waveforms at `sampling_rate` for one encoder, computed on the host."""
        return self.encoder(index).prepare(self._resampled(index, waveforms))

    def encode(self, clips: Clips) -> list[AudioFeatures]:
        """Features [B, A, E] of each encoder, from waveforms [N] at `sampling_rate`, encoded or prepared clips."""
        return [self._encode_part(i, part) for i, part in enumerate(self.prepare(clips).parts)]

    def encode_one(self, samples_N: Tensor) -> EncodedClip:
        """Encode one waveform at `sampling_rate` in a batch of its own; a long one in blocks, where that is exact."""
        seconds = waveform_seconds(samples_N, self.sampling_rate)
        if seconds > LONG_SECONDS:
            return EncodedClip(tuple(self._in_blocks(i, samples_N) for i in range(len(self.encoders))), seconds)
        # copies, since views would keep the padded tensors in memory
        real = tuple(stream.x_BAE[0, : stream.lengths[0]].clone() for stream in self.encode([samples_N]))
        return EncodedClip(real, seconds)

    def _in_blocks(self, index: int, samples_N: Tensor) -> Tensor:
        """Tokens [A, E] of one encoder, with the activations of one block if they are local in time.

        An encoder with windows has them in batches anyway.
        """
        stream = EncoderStream(self.encoder(index), self.sampling_rate)
        if stream.reach is None:
            features = self.encode_with(index, [samples_N])
            return features.x_BAE[0, : features.lengths[0]].clone()
        settled: list[Tensor] = []
        for block_N in samples_N.split(BLOCK_SECONDS * self.sampling_rate):
            new_AE, rest_AE = stream.append(block_N)
            settled.append(new_AE.clone())
        return torch.cat((*settled, rest_AE))

    def encode_with(self, index: int, clips: Sequence[Tensor] | Frames) -> AudioFeatures:
        """Features [B, A, E] of one encoder, from waveforms at `sampling_rate` or its frames."""
        return self.encoder(index).encode(clips if isinstance(clips, Frames) else self._resampled(index, clips))

    def connect(self, encoded: list[AudioFeatures]) -> list[AudioFeatures]:
        """Features [B, A, E] of each stream, from those of each encoder."""
        streams = []
        for connector, indices in zip(self.connectors, self.encoder_indices, strict=True):
            streams.append(connector(*(encoded[i] for i in indices)))
        return streams

    def _resampled(self, index: int, waveforms: Sequence[Tensor]) -> Sequence[Tensor]:
        rate = self.encoder(index).sampling_rate
        if rate == self.sampling_rate:
            return waveforms
        return [resample(samples_N, self.sampling_rate, rate) for samples_N in waveforms]

    def _check(self, clips: Sequence[EncodedClip]) -> None:
        widths = [self.encoder(i).width for i in range(len(self.encoders))]
        for clip in clips:
            found = [x_AE.shape[-1] for x_AE in clip.x_AE]
            if found != widths:
                raise PalError(f"an encoded clip has features of widths {found}, not {widths}; encode it anew")

    def _encode_part(self, index: int, part: Frames | AudioFeatures) -> AudioFeatures:
        encoder = self.encoder(index)
        if isinstance(part, Frames):
            return encoder.encode(part)
        return replace(part, x_BAE=to_device(part.x_BAE, next(encoder.parameters()).device))


def check_audio_tower(config: ModelConfig) -> None:
    """Check the options of encoders and connectors without building them. Raises ConfigError."""
    for part in config.encoders:
        check("encoder", part)
    for part, _ in _connections(config):
        check("connector", part)


def _padded(encoder: Encoder, clips: Sequence[Tensor]) -> AudioFeatures:
    """Features [A, E] of some clips padded to one tensor, in pinned memory if they will move to a CUDA device."""
    x_BAE = pad_sequence(list(clips), batch_first=True)
    if next(encoder.parameters()).is_cuda and not x_BAE.is_cuda:
        x_BAE = x_BAE.pin_memory()
    return AudioFeatures(x_BAE, tuple(len(x_AE) for x_AE in clips), encoder.seconds_per_token)


def _connections(config: ModelConfig) -> list[tuple[Part, list[int]]]:
    """(connector, indices of its encoders) for each stream."""
    count = len(config.encoders)
    if not isinstance(config.connector, list):
        if _n_encoders(config.connector) == 1:
            return [(config.connector, [i]) for i in range(count)]
        return [_checked(config.connector, list(range(count)))]
    found = []
    for place, part in enumerate(config.connector):
        options = dict(part)
        indices = options.pop("encoders", [place])
        if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
            raise ConfigError(f"connector '{part.get('name')}': 'encoders' takes a list of numbers, such as [0, 2]")
        found.append(_checked(options, indices))
    used = [i for _, indices in found for i in indices]
    if sorted(set(used)) != list(range(count)):
        raise ConfigError(
            f"connectors take the encoders {used}, but there are {count}, counted from 0; each must be taken by one"
        )
    return found


def _checked(part: Part, indices: list[int]) -> tuple[Part, list[int]]:
    if len(indices) != _n_encoders(part):
        raise ConfigError(f"connector '{part['name']}' takes {_n_encoders(part)} encoders, not {len(indices)}")
    return part, indices


def _n_encoders(part: Part) -> int:
    connector: type[Connector] = lookup("connector", part.get("name", ""))
    return connector.n_encoders
