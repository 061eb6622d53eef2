"""transformers' mask of padding for encoders, made without asking the device whether any token is padding.

transformers leaves a mask away where nothing is masked, and finds out by reading it: the host then waits for the device
at every batch. Here the caller says so, who knows the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_NAME = "pal_encoder"

_padded: ContextVar[bool] = ContextVar("padded", default=True)


def use_padding_mask(network: Any) -> None:
    """Padding mask of a transformers network made from known lengths, without asking the device."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(_NAME, _mask)
    network.set_attn_implementation(_NAME)


@contextmanager
def padded(batch: bool) -> Iterator[None]:
    """Within it, whether some token of the batch is padding; without it, some may be."""
    token = _padded.set(batch)
    try:
        yield
    finally:
        _padded.reset(token)


def _mask(*sizes: Any, **options: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*sizes, **{**options, "allow_is_bidirectional_skip": False}) if _padded.get() else None
