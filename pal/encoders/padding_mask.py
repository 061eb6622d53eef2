"""Padding mask for transformers encoders, made without waiting for the device.

transformers leaves the mask out if nothing is padding. To find out, it reads the mask, so that the host waits for the
device in each batch. Here the caller, who knows the lengths, says whether a batch has padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_NAME = "pal_encoder"

_has_padding: ContextVar[bool] = ContextVar("has_padding", default=True)


def use_padding_mask(network: Any) -> None:
    """Let a transformers network make its padding masks by `has_padding`, without reading them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(_NAME, _mask)
    network.set_attn_implementation(_NAME)


@contextmanager
def has_padding(value: bool) -> Iterator[None]:
    """Context in which all batches have padding, or none has; outside of it, a batch may have some."""
    token = _has_padding.set(value)
    try:
        yield
    finally:
        _has_padding.reset(token)


def _mask(*sizes: Any, **options: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*sizes, **{**options, "allow_is_bidirectional_skip": False}) if _has_padding.get() else None
