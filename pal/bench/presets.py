"""Presets of `pal bench`: shapes, lengths and repeats under a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from pal import hub_configs
from pal.config import StrictConfig, parse
from pal.errors import ConfigError

Variant = Literal["text", "plits", "lal", "lal_third", "pal", "flamingo", "qwen2audio", "mllama"]
Scope = Literal["llm", "end_to_end"]
Phase = Literal["prefill", "decode", "train", "decode_graph"]
Length = int | Literal["ragged"]
"""Audio tokens of every clip of a batch; `ragged` where clips and texts differ in length."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
SCOPES: tuple[Scope, ...] = get_args(Scope)
PHASES: tuple[Phase, ...] = ("prefill", "decode", "train")
"""Phases that run everywhere; `decode_graph`, decoding with a CUDA graph, needs a GPU."""


RAGGED = ((250, 48), (400, 64), (600, 96), (750, 128), (900, 80), (1100, 160), (1300, 192), (1500, 112))
"""Audio and text tokens of a realistic batch: clips of 10 to 60 seconds."""


@dataclass(frozen=True)
class BenchPoint:
    """Benchmark point: one phase on one batch, on which all variants are compared."""

    batch: int
    length: Length
    phase: Phase


class Preset(StrictConfig):
    """One benchmark."""

    name: str
    shape: str
    """Description of the LLM."""
    llm: dict[str, Any]
    """transformers' configuration of the LLM; a Llama, since the peers share its weights."""
    encoder: dict[str, Any]
    """transformers' AudioFlamingo3EncoderConfig (Qwen2Audio's encoder has the same layers); its width is that of the
    features, and of the layer inside each projector."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    variants: tuple[Variant, ...] = Field(default=VARIANTS, min_length=1)
    audio_tokens: tuple[Length, ...] = Field(default=(64, 256, 750, 1500, 15000), min_length=1)
    """A of a clip; each row of a batch has a clip of its own."""
    ragged: tuple[tuple[int, int], ...] = Field(default=RAGGED, min_length=2)
    """Audio and text tokens of the rows of a `ragged` batch, repeated cyclically for larger batches."""
    text_tokens: int = Field(default=128, ge=16)
    """T of a conversation: an eighth of them before the clip, and at the end a quarter that is the answer."""
    phases: tuple[Phase, ...] = Field(default=PHASES, min_length=1)
    scopes: tuple[Scope, ...] = Field(default=SCOPES, min_length=1)
    """The default one first."""
    batch: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Conversations."""
    prefill_batch: tuple[int, ...] = ()
    """Further batch sizes, for `prefill` alone."""
    train_tokens: int | None = Field(default=None, ge=1)
    """The most audio tokens of a training batch, which has fewer conversations where clips are longer."""
    repeats: int = Field(default=5, ge=0)
    """Timed rounds; 0 times nothing and only counts operations and bytes."""
    decode_tokens: int = Field(default=8, ge=1)
    """Tokens of a timed round of `decode`."""
    train_steps: int = Field(default=1, ge=1)
    """Steps of a timed round of `train`, in a row: on a GPU the host prepares the next step while one runs."""
    train: Literal["joint", "projectors"] = "joint"
    """What a training step trains: the LLM and the integration's weights (the paper's joint stage), or the latter."""
    compiled: bool = False
    """Whether `torch.compile` compiles the LLM's layers for prefill and training; decoding runs as it is."""
    compiler: str | None = None
    """torch.compile's backend; None for its own choice."""
    seconds: float | None = Field(default=None, gt=0)
    """Time limit; places that have not begun by then are left out."""

    @property
    def width(self) -> int:
        """Width E of the features."""
        return int(self.encoder["hidden_size"])

    def places(self) -> list[BenchPoint]:
        """Places, in the order in which they are measured."""
        found = (
            BenchPoint(self._rows(batch, length, phase), length, phase)
            for length in self.audio_tokens
            for phase in self.phases
            for batch in (*self.batch, *(self.prefill_batch if phase == "prefill" else ()))
        )
        # one row is not ragged
        return [place for place in dict.fromkeys(found) if place.length != "ragged" or place.batch > 1]

    def passes(self, phase: Phase) -> int:
        """Forward passes of a variant in one phase: the counted one, one for warm-up, and the timed ones."""
        rounds = self.repeats and 1 + self.repeats
        return 1 + rounds * self.each(phase)

    def each(self, phase: Phase) -> int:
        """Tokens or steps of a timed round."""
        return self.decode_tokens if phase.startswith("decode") else self.train_steps if phase == "train" else 1

    def _rows(self, batch: int, length: Length, phase: Phase) -> int:
        if phase != "train" or self.train_tokens is None or length == "ragged":
            return batch
        return min(batch, max(1, self.train_tokens // length))


def _encoder(width: int, layers: int, heads: int, mels: int = 128, positions: int = 1500) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "num_mel_bins": mels,
        "max_source_positions": positions,
    }


SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
LLAMA_1B = hub_configs.CONFIGS["meta-llama/Llama-3.2-1B-Instruct"]
_LLAMA_3B = hub_configs.CONFIGS["meta-llama/Llama-3.2-3B-Instruct"]
_AF_WHISPER = _encoder(1280, 32, 20)
_GPU: dict[str, Any] = {
    "encoder": _AF_WHISPER,
    "device": "cuda",
    "dtype": "bfloat16",
    "audio_tokens": (64, 256, 750, 1500, 7500, 15000),
    "batch": (1, 8, 32),
    "train_steps": 4,
    "compiled": True,
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="cpu-small",
            shape="4 layers of 32",
            llm=SMALL,
            encoder=_encoder(16, 1, 2, mels=80),
            # at 15000 PLITS alone takes a minute, whatever the width: attention's exponentials are what it does
            audio_tokens=(64, 256, 750, 1500),
            repeats=0,
        ),
        Preset(
            name="cpu",
            shape="Llama-3.2-1B cut to 4 layers, with an encoder of Whisper-small's size",
            llm={**LLAMA_1B, "num_hidden_layers": 4},
            encoder=_encoder(768, 12, 12),
            audio_tokens=(750, 1500),
        ),
        Preset(
            name="gpu-quick",
            shape="Llama-3.2-1B",
            llm=LLAMA_1B,
            **{
                **_GPU,
                "audio_tokens": (750, 1500, "ragged", 7500),
                "batch": (8,),
                "prefill_batch": (1,),
                "train_tokens": 30_000,
                "phases": ("train", "prefill", "decode", "decode_graph"),
                "scopes": ("llm",),
                "seconds": 300,
            },
        ),
        Preset(name="gpu", shape="Llama-3.2-1B, with an encoder of AF-Whisper's size", llm=LLAMA_1B, **_GPU),
        Preset(name="gpu-3b", shape="Llama-3.2-3B, with an encoder of AF-Whisper's size", llm=_LLAMA_3B, **_GPU),
    )
}


def preset_of(name: str, **changes: Any) -> Preset:
    """A preset by name, with some of its fields changed; what is None stays.

    Raises:
        ConfigError: no such preset, or a value that a field does not take.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    preset = parse(Preset, {**PRESETS[name].model_dump(), **given}, where="bench")
    lengths = [length for length in preset.audio_tokens if length != "ragged"]
    if min((*lengths, *preset.batch, *preset.prefill_batch, *(number for row in preset.ragged for number in row))) < 1:
        raise ConfigError("bench: audio tokens and batch sizes count from 1")
    # a row that is asked for twice is measured once, in the order that was asked for
    lists = ("variants", "audio_tokens", "phases", "scopes", "batch", "prefill_batch")
    return preset.model_copy(update={key: tuple(dict.fromkeys(getattr(preset, key))) for key in lists})
