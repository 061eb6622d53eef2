"""The attention function `pal`: the LLM's own queries also see keys and values made from audio.

transformers calls it in every layer of an unmodified LLM, with the forward's extra argument `attention_metadata`
(an `AttentionMetadata`). Without audio it is transformers' SDPA with the same masks, at no extra cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pal.backbone.attention_metadata import AttentionMetadata
from pal.backbone.cache import DecodingStep
from pal.backbone.interfaces import LaterRows
from pal.backbone.merged import merged_attention
from pal.backbone.packed import PackedLayer
from pal.errors import PalError

NAME = "pal"
"""Must not contain 'sdpa', 'flash' or 'flex_attention', which make transformers check the model class."""

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's attention: all but cuDNN's, see `without_cudnn`."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_metadata: AttentionMetadata | PackedLayer | DecodingStep | LaterRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, in the signature that transformers prescribes.

    Args:
        module: the attention module, which knows its `layer_idx`.
        query: [B, H, Q, C]. key, value: [B, G, K, C], after RoPE and after the cache.
        attention_mask: transformers' mask [B, 1, Q, K], or None where its causal shortcut holds.
        attention_metadata: which audio keys the queries see; None without audio.

    Returns:
        [B, Q, H, C] and None (no attention weights).
    """
    if isinstance(attention_metadata, PackedLayer):  # first, since a compiled layer must not learn its own number
        if attention_metadata.causal:
            with sdpa_kernel(_KERNELS):  # here, since backward may recompute a layer outside of the forward pass
                return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)
        return attention_metadata.attend(module, query, key, value, scaling), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(attention_metadata, LaterRows):
        return attention_metadata.attend(layer, query, key, value, scaling), None
    if isinstance(attention_metadata, DecodingStep):
        attention_mask = attention_metadata.masks[layer]
        if attention_mask is not None and attention_metadata.beams > 1:
            return _attend_together(query, key, value, attention_mask, attention_metadata.beams, dropout, scaling), None
        attention_metadata = None
    known = attention_metadata is None or isinstance(attention_metadata, AttentionMetadata)
    if not known or kwargs.get("audio_context") is not None:
        raise PalError("audio reached the attention without its query positions; call the model through Backbone")
    if attention_metadata is not None:
        attention_metadata.show(layer, query, key, scaling)
    if attention_metadata is None or attention_metadata.ordinary(layer):
        dtype = _trained_half_precision(query)
        if dtype is not None:
            query, key, value = query.float(), key.float(), value.float()
        with nullcontext() if dtype is None else torch.autocast("cpu", enabled=False):
            if attention_mask is None:
                out, _ = sdpa_attention_forward(
                    module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs
                )
            else:
                out = _masked_attention(query, key, value, attention_mask, dropout, scaling)
        return out if dtype is None else out.to(dtype), None
    sets = attention_metadata.sets(layer, key, value)
    if sets is not None:
        return merged_attention(query, sets, scaling).contiguous(), None
    q, k, v, seen_B1QK, scale = attention_metadata.whole(layer, query, key, value, scaling)
    return _masked_attention(q, k, v, seen_B1QK, dropout, scale)[..., : query.shape[-1]], None


def _trained_half_precision(query: Tensor) -> torch.dtype | None:
    """The 16-bit dtype of attention that is trained on a CPU, else None.

    The backward pass of the CPU's flash kernel takes 4 to 8 times as long in bfloat16 as in float32 for short
    rows (docs/benchmarks/cpu_attention.py), so such attention is computed in float32.
    """
    if query.device.type != "cpu" or not (query.requires_grad and torch.is_grad_enabled()):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _masked_attention(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, mask_B1QK: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Grouped-query attention under a dense mask, without copies of the key/value heads -> [B, Q, H, C]."""
    H, G = q_BHQC.shape[1], k_BGKC.shape[1]
    with sdpa_kernel(_KERNELS):
        if q_BHQC.device.type == "cpu" or G == H:
            out_BHQC = F.scaled_dot_product_attention(
                q_BHQC, k_BGKC, v_BGKC, attn_mask=mask_B1QK, dropout_p=dropout, scale=scaling, enable_gqa=G != H
            )
        else:
            out_BHQC = folded_attention(q_BHQC, k_BGKC, v_BGKC, mask_B1QK, dropout, scaling)
    return out_BHQC.transpose(1, 2).contiguous()


def folded_attention(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, mask_B1QK: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """The same where masked kernels know no groups: the queries of a group lie one after the other -> [B, H, Q, C]."""
    B, H, Q, C = q_BHQC.shape
    G = k_BGKC.shape[1]
    fold = H // G
    if mask_B1QK.shape[1] == H:  # a bias for each head
        mask = mask_B1QK.reshape(-1, G, fold * Q, mask_B1QK.shape[3])
    else:
        mask = mask_B1QK.expand(-1, -1, fold, -1) if Q == 1 else mask_B1QK.repeat(1, 1, fold, 1)
    out_BGRC = F.scaled_dot_product_attention(
        q_BHQC.reshape(B, G, fold * Q, C),
        k_BGKC,
        v_BGKC,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out_BGRC.reshape(B, H, Q, C)


def _attend_together(
    q_RH1C: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, mask_B1XK: Tensor, beams: int, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of the beams of each prompt to its keys in one call -> [B times beams, 1, H, C]."""
    B, G = k_BGKC.shape[:2]
    q_BGXC = q_RH1C.reshape(B, beams, G, -1, q_RH1C.shape[3]).transpose(1, 2)
    heads = q_BGXC.shape[3]
    if mask_B1XK.shape[1] == G * heads:  # a bias for each head
        mask_BGXHK = mask_B1XK.unflatten(1, (G, heads)).transpose(2, 3)
    else:
        mask_BGXHK = mask_B1XK[:, :, :, None].expand(-1, -1, -1, heads, -1)
    out_BGXC = F.scaled_dot_product_attention(
        q_BGXC.flatten(2, 3),
        k_BGKC,
        v_BGKC,
        attn_mask=mask_BGXHK.flatten(2, 3),
        dropout_p=dropout,
        scale=scaling,
    )
    return out_BGXC.unflatten(2, (beams, heads)).transpose(1, 2).reshape(B * beams, 1, G * heads, -1)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable cuDNN's attention kernels, which build a plan for every new shape, while the block lasts.

    On Hopper they are torch's first choice, and a plan takes longer than a decoding step.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


AttentionInterface.register(NAME, attend)
# without a mask function of the same name transformers passes no mask at all, silently
AttentionMaskInterface.register(NAME, sdpa_mask)
