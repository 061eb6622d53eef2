"""Input of all variants: the same text and the same clips, as features or as frames of a front-end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pal.bench.presets import Length, Preset
from pal.encoders.base import Encoder, join_windows
from pal.types import AUDIO, IGNORE, AudioFeatures, Tokens

Side = Literal["left", "right"]


@dataclass(frozen=True)
class EncoderFrames:
    """Front-end frames of some clips: windows, one clip after the other."""

    encoder: Encoder
    x_WFM: Tensor
    lengths: tuple[int, ...]
    """Real frames of each window."""
    tokens_W: Tensor
    """Audio tokens of each window."""


@dataclass(frozen=True)
class PaddedRows:
    """Rows of different lengths, padded to the longest, with a mask, as transformers' models take them."""

    source_BT: Tensor
    """Index of each row among the texts' B * T tokens, followed by the clips' B * A."""
    mask_BT: Tensor
    positions_BT: Tensor
    predicts_X: Tensor
    """Indices, in all rows one after the other, of the rows that predict an answer's token."""
    answers_X: Tensor
    """Tokens that they predict."""


@dataclass(frozen=True, eq=False)
class BenchScene:
    """B conversations of T text tokens, each with a clip of A tokens of its own between them.

    In a ragged scene, T and A are those of the longest, and shorter ones are padded at the end.
    """

    text_BT: Tensor
    before: int
    """Text tokens before the clip; in proportion in shorter texts."""
    answer: int
    """Trained text tokens at the end; in proportion in shorter texts."""
    audio_tokens: int
    given: AudioFeatures | None
    """Features; None where an encoder makes them."""
    frames: EncoderFrames | None
    """Frames for the encoder; None where features are given."""
    ragged: tuple[tuple[int, int], ...] | None = None
    """Audio and text tokens of each row, where they differ."""
    _padded: dict[tuple[bool, Side], PaddedRows] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """B."""
        return int(self.text_BT.shape[0])

    @property
    def text_tokens(self) -> int:
        """T."""
        return int(self.text_BT.shape[1])

    @property
    def length(self) -> Length:
        """Audio tokens of a clip, or `ragged`, as in tables."""
        return self.audio_tokens if self.ragged is None else "ragged"

    @cached_property
    def texts(self) -> list[list[int]]:
        """Token ids of each row, on the host, as a data loader gives them."""
        rows: list[list[int]] = self.text_BT.tolist()
        return rows if self.ragged is None else [row[:n] for row, (_, n) in zip(rows, self.ragged, strict=True)]

    def parts(self, text: list[int]) -> tuple[int, int]:
        """Number of tokens before the clip and in the answer of a text."""
        n = len(text)
        return n * self.before // self.text_tokens, n * self.answer // self.text_tokens

    @cached_property
    def befores(self) -> Tensor:
        """Tokens before the clip, of each row."""
        return torch.tensor([self.parts(text)[:1] for text in self.texts], device=self.text_BT.device)

    def alone(self) -> list[BenchScene]:
        """Each row of a ragged scene as a scene of its own."""
        assert self.ragged is not None
        found = []
        for row, (clip, n) in enumerate(self.ragged):
            text_1T = self.text_BT[row : row + 1, :n]
            before, answer = self.parts(self.texts[row])
            given = None
            if self.given is not None:
                given = replace(self.given, x_BAE=self.given.x_BAE[row : row + 1, :clip], lengths=(clip,))
            found.append(BenchScene(text_1T, before, answer, clip, given, None))
        return found

    def features(self) -> AudioFeatures:
        """Features [B, A, E], from the encoder where there is one."""
        if self.given is not None:
            return self.given
        assert self.frames is not None
        windows = self.frames.encoder(self.frames.x_WFM, self.frames.lengths)
        return join_windows(windows, [len(windows.lengths) // self.batch] * self.batch)

    def rows(self, with_audio: bool, trains: bool) -> list[Tokens]:
        """The conversations as an integration takes them."""
        rows = []
        for clip, text in enumerate(self.texts):
            before, answer = self.parts(text)
            labels = [IGNORE] * (len(text) - answer) + text[-answer:]
            ids = [*text[:before], AUDIO, *text[before:]] if with_audio else text
            rows.append(Tokens(ids, [clip] if with_audio else [], [IGNORE] * with_audio + labels if trains else None))
        return rows

    def padded(self, with_audio: bool, side: Side) -> PaddedRows:
        """The ragged conversations as transformers' models take them; made once."""
        if (with_audio, side) not in self._padded:
            self._padded[with_audio, side] = self._pad(with_audio, side)
        return self._padded[with_audio, side]

    def _pad(self, with_audio: bool, side: Side) -> PaddedRows:
        assert self.ragged is not None
        lengths = [len(text) + with_audio * clip for text, (clip, _) in zip(self.texts, self.ragged, strict=True)]
        longest = max(lengths)
        source_BT, mask_BT, positions_BT = (torch.zeros(self.batch, longest, dtype=torch.long) for _ in range(3))
        predicts, answers = [], []
        for row, (text, (clip, _)) in enumerate(zip(self.texts, self.ragged, strict=True)):
            before, answer = self.parts(text)
            own_T = torch.arange(len(text)) + row * self.text_tokens
            clip_A = self.batch * self.text_tokens + row * self.audio_tokens + torch.arange(with_audio * clip)
            first = longest - lengths[row] if side == "left" else 0
            place = slice(first, first + lengths[row])
            source_BT[row, place] = torch.cat((own_T[:before], clip_A, own_T[before:]))
            mask_BT[row, place] = 1
            positions_BT[row, place] = torch.arange(lengths[row])
            last = row * longest + first + lengths[row] - 1
            predicts.append(torch.arange(last - answer, last))
            answers += text[-answer:]
        made = (source_BT, mask_BT, positions_BT, torch.cat(predicts), torch.tensor(answers))
        return PaddedRows(*(x.to(self.text_BT.device) for x in made))


def make_scene(
    preset: Preset, batch: int, audio_tokens: Length, vocab: int, encoder: Encoder | None, shapes: bool = False
) -> BenchScene:
    """Random text and random clips: noise for the encoder, or noise in its place where there is none.

    A ragged scene takes no encoder. With `shapes` features are left out, for closed forms that need sizes alone.
    """
    generator = torch.Generator().manual_seed(0)
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    ragged = None
    longest, text_tokens = audio_tokens, preset.text_tokens
    if audio_tokens == "ragged":
        assert encoder is None
        ragged = tuple(islice(cycle(preset.ragged), batch))
        longest, text_tokens = (max(numbers) for numbers in zip(*ragged, strict=True))
    assert longest != "ragged"
    # the last id stands for audio in Qwen2Audio's own rows
    text_BT = torch.randint(0, vocab - 1, (batch, text_tokens), generator=generator).to(device)
    given = frames = None
    if encoder is None and not shapes:
        noise = torch.Generator(device).manual_seed(0)
        x_BAE = torch.randn(batch, longest, preset.width, generator=noise, device=device).to(dtype)
        lengths = (longest,) * batch if ragged is None else tuple(clip for clip, _ in ragged)
        given = AudioFeatures(x_BAE, lengths, 0.04)
    elif encoder is not None:
        frames = _frames(encoder, batch, longest, generator, device, dtype)
    return BenchScene(
        text_BT=text_BT,
        before=text_tokens // 8,
        answer=text_tokens // 4,
        audio_tokens=longest,
        given=given,
        frames=frames,
        ragged=ragged,
    )


def _frames(
    encoder: Encoder,
    batch: int,
    audio_tokens: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> EncoderFrames:
    assert encoder.window_seconds is not None
    window = round(encoder.window_seconds / encoder.seconds_per_token)
    whole, rest = divmod(audio_tokens, window)
    counts = [window] * whole + [rest] * (rest > 0)
    per_token = encoder.seconds_per_token * encoder.sampling_rate
    made = {n: encoder.frontend(0.1 * torch.randn(round(n * per_token), generator=generator)) for n in set(counts)}
    windows = [made[n] for n in counts] * batch
    return EncoderFrames(
        encoder=encoder,
        x_WFM=pad_sequence(windows, batch_first=True).to(device, dtype),
        lengths=tuple(len(frames_FM) for frames_FM in windows),
        tokens_W=torch.tensor(counts * batch, device=device),
    )
