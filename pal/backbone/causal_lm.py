"""transformers' causal LLMs with `audio_context` among the arguments of their forward, and nothing else changed."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pal.backbone import regions
from pal.backbone.attention import without_cudnn
from pal.backbone.cache import JointCache
from pal.backbone.context import AudioContext
from pal.backbone.families import FAMILIES
from pal.backbone.packed import PackedContext
from pal.backbone.prefill import cache_for, continued, through_cache
from pal.backbone.shared_prefix import SharedPrefixCache
from pal.errors import PalError


class AudioCausalLM:
    """A causal LLM whose forward has an argument `audio_context`: `generate` refuses arguments without a name there."""

    plain: Any
    """transformers' class, which this is a subclass of."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, although the class is not in transformers: all its layers are transformers' own."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches the source text of the class's module
        return bool(cls.plain._can_set_attn_implementation())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_context: AudioContext | PackedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' forward, in which the rows also attend to the audio keys of `audio_context`."""
        forward = partial(super().forward, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep)  # type: ignore[misc]
        fresh = use_cache and past_key_values is None and not torch.is_grad_enabled()
        if fresh and isinstance(audio_context, AudioContext):
            past_key_values = cache_for(audio_context, inputs_embeds, attention_mask, position_ids)
        if isinstance(past_key_values, JointCache):
            compiled = regions.is_compiled(self.model.layers[0])  # type: ignore[attr-defined]
            given = (input_ids, inputs_embeds, attention_mask, position_ids)
            return through_cache(forward, past_key_values, *given, kwargs, compiled)
        if isinstance(past_key_values, SharedPrefixCache):
            compiled = regions.is_compiled(self.model.layers[0])  # type: ignore[attr-defined]
            return continued(forward, past_key_values, input_ids, position_ids, kwargs, compiled)
        if audio_context is not None:
            if getattr(past_key_values, "is_compileable", False):
                raise PalError("this cache cannot be used with audio; leave cache_implementation out or say 'static'")
            if isinstance(audio_context, PackedContext):
                if past_key_values is not None or use_cache or attention_mask is None:
                    raise PalError("packed rows need their attention_mask and use_cache=False; generate keeps them")
                kwargs["attention_metadata"], attention_mask = audio_context, audio_context.mask(attention_mask)
            else:
                kwargs["attention_metadata"] = audio_context.attention_metadata(attention_mask, position_ids)
        with without_cudnn():
            return forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' inputs of the next forward, with the attention mask that `generate` drops if it is all ones."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("audio_context") is not None and inputs.get("attention_mask") is None:
            positions_BQ = inputs["position_ids"]
            cache = inputs.get("past_key_values")
            seen = positions_BQ.shape[1] + (0 if cache is None else cache.get_seq_length())
            inputs["attention_mask"] = positions_BQ.new_ones((positions_BQ.shape[0], seen))
        return inputs


def class_for(config: PreTrainedConfig) -> Any:
    """transformers' class for a configuration of a supported family, as an `AudioCausalLM`; the name stays."""
    return _with_audio(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@cache
def _with_audio(plain: Any) -> Any:
    # one class for all models, found in this module by its name, since pickle needs both
    return type(plain.__name__, (AudioCausalLM, plain), {"__module__": __name__, "plain": plain})


def __getattr__(name: str) -> Any:
    """Class of an LLM that takes `audio_context`, by transformers' name, such as `LlamaForCausalLM`."""
    for family in FAMILIES:
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] == name:
            return _with_audio(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
