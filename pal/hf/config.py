"""`PalConfig`: a bundle's `config.json` as transformers' configuration."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class PalConfig(PreTrainedConfig):
    """transformers configuration that holds the fields of a bundle's `config.json`.

    Args:
        format: version of the bundle's format.
        model: the fields of `pal.model_config.ModelConfig`.
        llm: the LLM's own configuration.
        encoders: name and options of each encoder, enough to build it without its source.
        lora: options of the LoRA adapters; None without adapters.
        left_out: SHA-256 of each weight that is read from its source, not stored in the bundle; by name.
        tokenizer: source and digest of a tokenizer that is read from there; None if the bundle has it.
        kwargs: fields of `PreTrainedConfig`.
    """

    model_type = "pal"

    def __init__(
        self,
        format: int | None = None,
        model: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        encoders: list[dict[str, Any]] | None = None,
        lora: dict[str, Any] | None = None,
        left_out: dict[str, str] | None = None,
        tokenizer: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.format = format
        self.model = model
        self.llm = llm
        self.encoders = encoders
        self.lora = lora
        self.left_out = left_out or {}
        self.tokenizer = tokenizer
        super().__init__(**kwargs)
        _register_model()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The LLM's configuration."""
        from transformers import AutoConfig

        if not self.llm:
            return self
        fields = dict(self.llm)
        text: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return text

    def description(self) -> dict[str, Any]:
        """The part of `config.json` that `pal.bundle` reads."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        names = ("format", "model", "llm", "encoders", "lora", "left_out", "tokenizer")
        return {"dtype": dtype, **{name: getattr(self, name) for name in names}}


@cache
def _register_model() -> None:
    from pal.hf.auto import register

    register()
