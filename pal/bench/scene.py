"""What every variant is given to read: the same text and the same clips, as features or as frames of a front-end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pal.bench.presets import Preset
from pal.encoders.base import Encoder, join_windows
from pal.types import AUDIO, IGNORE, AudioFeatures, Tokens


@dataclass(frozen=True)
class Frames:
    """Clips as an encoder's front-end leaves them: windows, one clip after the other."""

    encoder: Encoder
    x_WFM: Tensor
    lengths: tuple[int, ...]
    """Real frames of each window."""
    tokens_W: Tensor
    """Audio tokens of each window."""


@dataclass(frozen=True)
class Scene:
    """B conversations of T text tokens, each with a clip of A tokens of its own between them."""

    text_BT: Tensor
    before: int
    """Text tokens before the clip."""
    answer: int
    """Text tokens at the end that are trained."""
    audio_tokens: int
    given: AudioFeatures | None
    """Where features are given."""
    frames: Frames | None
    """Where an encoder makes them."""

    @property
    def batch(self) -> int:
        """B."""
        return int(self.text_BT.shape[0])

    @property
    def text_tokens(self) -> int:
        """T."""
        return int(self.text_BT.shape[1])

    def features(self) -> AudioFeatures:
        """[B, A, E], made by the encoder where there is one."""
        if self.given is not None:
            return self.given
        assert self.frames is not None
        heard = self.frames.encoder(self.frames.x_WFM, self.frames.lengths)
        return join_windows(heard, [len(heard.lengths) // self.batch] * self.batch)

    def rows(self, hears: bool, trains: bool) -> list[Tokens]:
        """The conversations as an integration takes them."""
        rows = []
        for clip, text in enumerate(self.text_BT.tolist()):
            labels = [IGNORE] * (len(text) - self.answer) + text[-self.answer :]
            ids = [*text[: self.before], AUDIO, *text[self.before :]] if hears else text
            rows.append(Tokens(ids, [clip] if hears else [], [IGNORE] * hears + labels if trains else None))
        return rows


def make_scene(preset: Preset, batch: int, audio_tokens: int, vocab: int, encoder: Encoder | None) -> Scene:
    """Random text and random clips: noise for the encoder, or noise in its place where there is none."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    # the last id stands for audio in Qwen2Audio's own rows
    text_BT = torch.randint(0, vocab - 1, (batch, preset.text_tokens), generator=generator).to(device)
    given = frames = None
    if encoder is None:
        x_BAE = torch.randn(batch, audio_tokens, preset.width, generator=generator).to(device, dtype)
        given = AudioFeatures(x_BAE, (audio_tokens,) * batch, 0.04)
    else:
        frames = _frames(encoder, batch, audio_tokens, generator, device, dtype)
    return Scene(
        text_BT=text_BT,
        before=preset.text_tokens // 8,
        answer=preset.text_tokens // 4,
        audio_tokens=audio_tokens,
        given=given,
        frames=frames,
    )


def _frames(
    encoder: Encoder,
    batch: int,
    audio_tokens: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> Frames:
    assert encoder.window_seconds is not None
    window = round(encoder.window_seconds / encoder.seconds_per_token)
    whole, rest = divmod(audio_tokens, window)
    counts = [window] * whole + [rest] * (rest > 0)
    per_token = encoder.seconds_per_token * encoder.sampling_rate
    made = {n: encoder.frontend(0.1 * torch.randn(round(n * per_token), generator=generator)) for n in set(counts)}
    windows = [made[n] for n in counts] * batch
    return Frames(
        encoder=encoder,
        x_WFM=pad_sequence(windows, batch_first=True).to(device, dtype),
        lengths=tuple(len(frames_FM) for frames_FM in windows),
        tokens_W=torch.tensor(counts * batch, device=device),
    )
