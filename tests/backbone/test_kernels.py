"""Attention to one rectangle, and its gradients with a merged log-sum-exp, against autograd over plain products."""

import pytest
import torch

from pal.backbone import kernels
from pal.backbone.merged import Keys, Piece, masked, merged_attention

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def staircase(Q, K):
    return masked((torch.arange(K) <= torch.arange(Q)[:, None])[None, None])[0].mask.double()


CASES = {"causal": (7, 7, True, None), "whole": (5, 9, False, None), "masked": (6, 8, False, staircase(6, 8))}


@pytest.mark.parametrize("kernel", ["device", "plain"])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_beside_other_keys(case, scale, kernel):
    """All keys at once by autograd; the rectangle's share of it by the kernel."""
    Q, K, causal, mask = case
    forward, backward = {
        "device": (kernels.attend, kernels.attend_backward),
        "plain": (kernels.plain, kernels.plain_backward),
    }[kernel]
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

    out, lse = forward(q.detach(), k.detach(), v.detach(), causal, mask, scale)
    torch.testing.assert_close(lse, scores[..., :K].logsumexp(-1).to(lse.dtype))
    torch.testing.assert_close(out, scores[..., :K].softmax(-1) @ repeated[1][:, :, :K])
    _, dk, dv = backward(
        grad, q.detach(), k.detach(), v.detach(), together.detach(), scores.logsumexp(-1).detach(), causal, mask, scale
    )
    torch.testing.assert_close(dk, expected[0])
    torch.testing.assert_close(dv, expected[1])


def test_merged_attention_is_the_same_by_plain_products(monkeypatch):
    """As where a device has kernels without masks only: the rest is written out."""
    q, k, v, audio, values = (
        random(2, heads, length, 8, seed=seed).requires_grad_()
        for seed, (heads, length) in enumerate([(4, 6), (2, 6), (2, 6), (2, 6), (2, 6)])
    )
    rows = (Piece((0, 2), (0, 6), (0, 6), causal=True),)
    seen = torch.arange(6) <= torch.arange(6)[:, None] - 2

    def run():
        out = merged_attention(q, (Keys(k, v, rows), Keys(audio, values, masked(seen[None, None]))), None)
        return out, *torch.autograd.grad(out, (q, k, v, audio, values), random(*out.shape, seed=9))

    expected = run()
    monkeypatch.setattr(kernels, "attend", kernels.plain)
    monkeypatch.setattr(kernels, "attend_backward", kernels.plain_backward)
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_trial_of_a_device(dtype, bound):
    assert kernels.worst("cpu", dtype, 16) < bound


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice goes; its kernels are the CPU's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    whole = kernels.worst
    monkeypatch.setattr(kernels, "worst", lambda device, dtype, head_width: whole("cpu", dtype, head_width))
    kernels._right.cache_clear()
    yield torch.device("cuda", 0)
    kernels._right.cache_clear()


def test_the_choice_by_device_and_shape(gpu, monkeypatch):
    assert kernels.takes_apart(CPU, torch.float32, 20)
    assert kernels.takes_apart(gpu, torch.bfloat16, 64)
    assert not kernels.takes_apart(gpu, torch.float32, 64)
    assert not kernels.takes_apart(gpu, torch.bfloat16, 20)
    assert not kernels.takes_apart(gpu, torch.bfloat16, 512)
    assert not kernels.takes_apart(torch.device("meta"), torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


def test_wrong_kernels_are_not_chosen(gpu, monkeypatch):
    right = kernels.attend_backward
    monkeypatch.setattr(kernels, "attend_backward", lambda *given: tuple(2 * x for x in right(*given)))
    with pytest.warns(UserWarning, match="off by"):
        assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("error", [-0.04, 0.04])
def test_kernels_that_are_a_little_off_are_not_chosen(gpu, monkeypatch, which, error):
    """Twice what rounding to 16 bits makes of numbers about 1; the trial's bound lies between."""
    right = kernels.attend_backward
    monkeypatch.setattr(
        kernels,
        "attend_backward",
        lambda *given: tuple((1 + error * (i == which)) * x for i, x in enumerate(right(*given))),
    )
    with pytest.warns(UserWarning, match="off by"):
        assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


@pytest.mark.parametrize("causal", [True, False])
def test_kernels_that_are_wrong_in_one_kind_of_rectangle_are_not_chosen(gpu, monkeypatch, causal):
    right = kernels.attend

    def wrong(q, k, v, is_causal, mask, scale):
        out, lse = right(q, k, v, is_causal, mask, scale)
        return out * (1.1 if is_causal == causal else 1.0), lse

    monkeypatch.setattr(kernels, "attend", wrong)
    with pytest.warns(UserWarning, match="off by"):
        assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


def test_a_log_sum_exp_that_is_a_little_off_is_not_chosen(gpu, monkeypatch):
    right = kernels.attend

    def off(*given):
        out, lse = right(*given)
        return out, lse * 1.04

    monkeypatch.setattr(kernels, "attend", off)
    with pytest.warns(UserWarning, match="off by"):
        assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


def test_missing_kernels_are_not_chosen(gpu, monkeypatch):
    def missing(*given):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(kernels, "attend", missing)
    with pytest.warns(UserWarning, match="off by inf"):
        assert not kernels.takes_apart(gpu, torch.bfloat16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_width", [64, 128])
def test_kernels_of_a_gpu(head_width):
    assert kernels.worst("cuda", torch.bfloat16, head_width) < 0.02
    assert kernels.takes_apart(torch.device("cuda", 0), torch.bfloat16, head_width)
