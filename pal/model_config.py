"""Configuration of a model, as in a recipe or a bundle."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pal import hub_configs
from pal.config import StrictConfig
from pal.data.prompts import PromptStyle
from pal.pretrained import KNOWN
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
"""Fields of an LLM's configuration that do not decide its size; `toy` keeps them."""


class LLMConfig(StrictConfig):
    """The language model: an existing one (`path`), or a new one with random weights (`fresh`)."""

    path: str | None = None
    """Hub id, local folder or GGUF file of a decoder-only LLM with its tokenizer, or `smollm2-135m-instruct`, which
    `pal models get smol` downloads."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub."""
    fresh: dict[str, Any] | None = None
    """A transformers configuration: `model_type` and the fields that differ from its defaults."""
    tokenizer: str | None = None
    """Hub id, local folder or GGUF file of the tokenizer; the default is that of `path`."""
    vocabulary: int | None = None
    """With `fresh` and no `tokenizer`: size of a byte-level BPE vocabulary, trained on the recipe's text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the LLM's weights in memory."""

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
        """A fresh LLM of the same family with four layers of width 32 and a tokenizer trained on the recipe's text."""
        kept = {name: value for name, value in self.fields().items() if name in _KEPT}
        return LLMConfig(fresh=kept | _TOY, vocabulary=320, dtype=self.dtype)


Part = dict[str, Any]
"""`{"name": ..., option: value}`; the options are checked against the `Config` of the class."""


class ModelConfig(StrictConfig):
    """Encoder -> connector -> integration -> LLM."""

    llm: LLMConfig
    """A string is short for `{path: ...}`."""
    encoders: list[Part] = Field(min_length=1)
    """Audio encoders, by name and options. A Hub id alone is short for the encoder class with this id in its `hub_ids`,
    or for `whisper` if there is none; so is `whisper-tiny.en`."""
    connector: Part | list[Part] = {"name": "mlp"}
    """Connectors between encoders and integration; each makes one stream. A single one is used for each encoder, or
    fuses all of them (`lfst`). In a list, each takes the encoder of its index, or those of `encoders: [0, 2]`."""
    integration: Part = {"name": "pal"}
    """Fusion method: how audio enters the LLM."""
    system: str | None = None
    """System prompt of conversations without one."""
    after_clip: str = ""
    """Text between a clip and what follows it, where the question has no `<audio>`. By default none, so that the text
    is the same with and without a clip; bundles of earlier versions have a line break."""
    adapters: Literal["always", "with_audio"] = "always"
    """Conversations in which `ask` uses the LLM's LoRA adapters: "always", or only "with_audio", so that text alone is
    answered by the LLM as it was before training. Training and evaluation, also that without audio, always use them."""
    notice: str | None = None
    """Warning about the model's limits, shown by `pal ask`."""

    @property
    def style(self) -> PromptStyle:
        """What the model adds to what it is asked."""
        return PromptStyle(self.system, self.after_clip)

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
    if "/" not in text and text not in KNOWN:
        return {"name": text}
    published = (name for name in names("encoder") if text.startswith(lookup("encoder", name).hub_ids))  # type: ignore[attr-defined]
    return {"name": next(published, "whisper"), "path": text}
