"""What a model is made of, as a recipe or a bundle writes it."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pal import hub_configs
from pal.config import StrictConfig
from pal.registry import lookup, names

_TOY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32768,
}
_KEPT = {
    "model_type",
    "tie_word_embeddings",
    "initializer_range",
    "attention_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "query_pre_attn_scalar",
}
"""What makes an LLM of its kind without saying how large it is."""


class LLMConfig(StrictConfig):
    """The language model: an existing one (`path`), or a new one with random weights (`fresh`)."""

    path: str | None = None
    """Hub id or local folder of a decoder-only LLM with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub."""
    fresh: dict[str, Any] | None = None
    """A transformers configuration: `model_type` and whatever differs from that type's defaults."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer; without it, that of `path`."""
    vocabulary: int | None = None
    """With `fresh` and no `tokenizer`: entries of a byte-level BPE trained on the recipe's own text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the LLM's weights in memory."""

    @model_validator(mode="after")
    def _one_source(self) -> "LLMConfig":
        if (self.path is None) == (self.fresh is None):
            raise ValueError("give either 'path' or 'fresh'")
        return self

    def fields(self) -> dict[str, Any]:
        """The LLM's transformers configuration, without downloading anything.

        Raises:
            ConfigError: `path` is neither a folder, nor in the local cache, nor known.
        """
        if self.fresh is not None:
            return dict(self.fresh)
        assert self.path is not None
        return hub_configs.config_of(self.path, self.revision)

    def toy(self) -> "LLMConfig":
        """A fresh LLM of the same family, four layers of 32, whose tokenizer learns from the recipe's text."""
        kept = {name: value for name, value in self.fields().items() if name in _KEPT}
        return LLMConfig(fresh=kept | _TOY, vocabulary=320, dtype=self.dtype)


Part = dict[str, Any]
"""`{"name": ..., option: value}`; the options are checked by the class that the name stands for."""


class ModelConfig(StrictConfig):
    """Encoder -> connector -> integration -> LLM."""

    llm: LLMConfig
    """A string is short for `{path: ...}`."""
    encoders: list[Part] = Field(min_length=1)
    """The audio encoders, by name and options. A Hub id alone is short for the encoder that is published so, and for
    a Whisper where none is known."""
    connector: Part | list[Part] = {"name": "mlp"}
    """What stands between encoders and integration: one for all of them, or a list, of which each may say by
    `encoders: [0, 2]` which it takes, and else takes the one in its place. Each makes a stream of tokens."""
    integration: Part = {"name": "pal"}
    """How the audio enters the LLM."""
    system: str | None = None
    """System prompt put before conversations that bring none."""
    notice: str | None = None
    """What a user must know before trusting an answer; shown by `pal ask`."""

    @field_validator("llm", mode="before")
    @classmethod
    def _llm_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("connector", "integration", mode="before")
    @classmethod
    def _part_name(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return {"name": value} if isinstance(value, str) else value

    @field_validator("encoders", mode="before")
    @classmethod
    def _encoder_names(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [_encoder(item) if isinstance(item, str) else item for item in value]
        return value


def _encoder(text: str) -> Part:
    if "/" not in text:
        return {"name": text}
    published = (name for name in names("encoder") if text.startswith(lookup("encoder", name).hub_ids))  # type: ignore[attr-defined]
    return {"name": next(published, "whisper"), "path": text}
