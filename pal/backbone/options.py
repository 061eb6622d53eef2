"""Options of transformers' `generate` that are unsupported with audio, each refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pal.errors import PalError

_OTHER_DECODING = "it would run the LLM without the audio; leave it out"
_OF_THE_PROMPT = "the prompt reaches the LLM as embeddings, not as ids; leave it out"
_NO_CODE = "it loads code from the Hub; leave it out"
_REFUSED = {
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "assistant_early_exit", "prompt_lookup_num_tokens"), _OTHER_DECODING
    ),
    **dict.fromkeys(("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"), _OTHER_DECODING),
    "prefill_chunk_size": _OTHER_DECODING,
    "past_key_values": "each call makes its own; leave it out",
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "token_healing"), _OF_THE_PROMPT),
    **dict.fromkeys(("inputs_embeds", "position_ids"), "the model makes them; give input_ids and input_values"),
    **dict.fromkeys(
        ("custom_generate", "dola_layers", "penalty_alpha", "num_beam_groups", "diversity_penalty", "constraints"),
        _NO_CODE,
    ),
    "force_words_ids": _NO_CODE,
}
_OFF = {"encoder_repetition_penalty": 1.0, "num_beam_groups": 1}
"""Values, besides None, False and 0, that turn an option off."""


def check_generation(options: Mapping[str, Any]) -> None:
    """Check options of `generate`, and those in its `generation_config`.

    Raises:
        PalError: an unsupported option.
    """
    config = options.get("generation_config")
    asked = {**(config.to_diff_dict() if config is not None else {}), **options}
    for name, reason in _REFUSED.items():
        value = asked.get(name)
        unused = value is None or (isinstance(value, bool | int | float) and value in (0, _OFF.get(name, 0)))
        if name == "guidance_scale":  # 0 does not turn it off
            unused = value is None or value == 1
        if not unused:
            raise PalError(f"generate: '{name}' is not supported: {reason}")
