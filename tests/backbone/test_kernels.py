"""Attention to one rectangle, and its gradients with a merged log-sum-exp, against autograd over plain products."""

import pytest
import torch

from pal.backbone import kernels
from pal.backbone.merged import masked


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def staircase(Q, K):
    return masked((torch.arange(K) <= torch.arange(Q)[:, None])[None, None])[0].mask.double()


CASES = {"causal": (7, 7, True, None), "whole": (5, 9, False, None), "masked": (6, 8, False, staircase(6, 8))}


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_beside_other_keys(case, scale):
    """All keys at once by autograd; the rectangle's share of it by the kernel."""
    Q, K, causal, mask = case
    q, k, v, others, other_values = (
        random(2, heads, length, 8, seed=seed).requires_grad_()
        for seed, (heads, length) in enumerate([(4, Q), (2, K), (2, K), (2, 5), (2, 5)])
    )
    repeated = [torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((k, others), (v, other_values))]
    scores = q @ repeated[0].mT * (8**-0.5 if scale is None else scale)
    seen = torch.zeros(Q, K, dtype=torch.float64)
    if causal:
        seen = seen.masked_fill(torch.ones(Q, K, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        seen = mask[0, 0]
    scores = scores + torch.cat((seen, torch.zeros(Q, 5, dtype=torch.float64)), 1)
    together = scores.softmax(-1) @ repeated[1]
    grad = random(*q.shape, seed=9)
    expected = torch.autograd.grad(together, (k, v), grad)

    for attend in (kernels.attend, kernels.attend_elsewhere):
        out, lse = attend(q.detach(), k.detach(), v.detach(), causal, mask, scale)
        torch.testing.assert_close(lse, scores[..., :K].logsumexp(-1).to(lse.dtype))
        torch.testing.assert_close(out, scores[..., :K].softmax(-1) @ repeated[1][:, :, :K])
    _, dk, dv = kernels.attend_backward(
        grad, q.detach(), k.detach(), v.detach(), together.detach(), scores.logsumexp(-1).detach(), causal, mask, scale
    )
    torch.testing.assert_close(dk, expected[0])
    torch.testing.assert_close(dv, expected[1])


def test_sets_are_taken_apart_on_a_cpu_alone():
    assert kernels.supports_split_attention(torch.device("cpu"))
    assert not kernels.supports_split_attention(torch.device("cuda")) and not kernels.supports_split_attention(
        torch.device("meta")
    )


def test_scores_of_half_precision_are_computed_in_float32():
    q, k, v = (
        4 * random(1, heads, length, 16, seed=i).to(torch.bfloat16)
        for i, (heads, length) in enumerate([(4, 3), (2, 50), (2, 50)])
    )
    out, lse = kernels.attend_elsewhere(q, k, v, False, None, None)
    exact, exact_lse = kernels.attend_elsewhere(q.double(), k.double(), v.double(), False, None, None)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), exact, atol=0.04, rtol=0.01)
