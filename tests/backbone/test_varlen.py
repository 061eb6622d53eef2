"""Attention within segments: the plain form against dense attention, and what torch's kernel is called with."""

import inspect
from functools import wraps

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from pal.backbone import varlen
from pal.backbone.rms import rms_norm
from pal.backbone.varlen import has_kernel, segment_attention

H, G, C = 4, 2, 8


def firsts(*counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def dense(q, k, v, counts_q, counts_k, causal, window, scale):
    """[N, H, C], every pair of the batch in one product."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    a = b = 0
    for Q, K in zip(counts_q, counts_k, strict=True):
        for i in range(Q):
            last = K - Q + i + 1 if causal else K
            distances = K - Q + i - torch.arange(K)
            seen[a + i, b : b + last] = (distances < (window or 10**6))[:last]
        a, b = a + Q, b + K
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    scores = torch.einsum("qhc,khc->hqk", q, k) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khc->qhc", weights, v)


@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients(causal, window, scale):
    torch.manual_seed(0)
    counts_q, counts_k = (3, 1, 4, 2), (3, 6, 9, 2)
    q = torch.randn(sum(counts_q), H, C, dtype=torch.double, requires_grad=True)
    k = torch.randn(sum(counts_k), G, C, dtype=torch.double, requires_grad=True)
    v = torch.randn_like(k, requires_grad=True)
    grad = torch.randn_like(q)
    longest = max(counts_q), max(counts_k)
    out = segment_attention(q, k, v, firsts(*counts_q), firsts(*counts_k), *longest, causal, window, scale)
    found = torch.autograd.grad(out, (q, k, v), grad)
    expected = dense(q, k, v, counts_q, counts_k, causal, window, C**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), grad))


def test_segments_without_keys_or_queries():
    q = torch.randn(5, H, C, requires_grad=True)
    k = torch.randn(4, G, C, requires_grad=True)
    out = segment_attention(q, k, k, firsts(2, 3, 0), firsts(0, 3, 1), 3, 3, causal=False)
    assert not out[:2].any()
    out.sum().backward()
    assert not q.grad[:2].any() and not k.grad[3:].any() and k.grad[:3].any()


def test_half_precision_is_as_near_as_it_can_be():
    torch.manual_seed(0)
    q, k = torch.randn(6, H, C), torch.randn(9, G, C)
    at = (firsts(2, 4), firsts(2, 7), 4, 7)
    exact = segment_attention(q, k, k, *at)
    half = segment_attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), *at)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)


def test_torchs_kernel_takes_what_it_is_given(monkeypatch):
    """The call for a GPU, with the kernel replaced by one that only reads its arguments."""
    q, k = torch.randn(3, H, C), torch.randn(7, G, C)
    given = {}

    @wraps(varlen_attn)
    def kernel(*args, **kwargs):
        given.update(inspect.signature(varlen_attn).bind(*args, **kwargs).arguments)
        return args[0]

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    varlen.flash(q, k, k, firsts(3), firsts(7), 3, 7, True, 4, 0.5)
    assert given["window_size"] == (3, 0) and given["scale"] == 0.5 and (given["max_q"], given["max_k"]) == (3, 7)
    varlen.flash(q, k, k, firsts(3), firsts(7), 3, 7, True, None, None)
    assert given["window_size"] == (-1, 0)
    varlen.flash(q, k, k, firsts(3), firsts(7), 3, 7, False, None, None)
    assert given["window_size"] == (-1, -1)
    takes = "enable_gqa" in inspect.signature(varlen_attn).parameters
    assert given.get("enable_gqa", False) is takes


def test_the_kernel_is_for_half_precision_on_a_gpu():
    assert not has_kernel(torch.device("cpu"), torch.bfloat16, 64)
    assert not has_kernel(torch.device("cuda"), torch.float32, 64)
    assert not has_kernel(torch.device("cuda"), torch.bfloat16, 60)


@pytest.mark.parametrize("dtype", [torch.double, torch.float32])
def test_rms_norm(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    out = rms_norm(x, weight, 1e-3)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    torch.testing.assert_close(out, expected)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (out, expected)), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right)
