"""What attention's fused kernels count as, by the counter's own formulas, given what CUDA's kernels are given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pal.bench.flops import flop_counter

B, H, Q, K, C, V = 2, 8, 10, 30, 64, 32
FORWARD = 2 * B * H * Q * K * (C + V)
BACKWARD = 2 * B * H * Q * K * (3 * C + 2 * V)
FIRST_Q, FIRST_K = (0, 3, 10), (0, 5, 30)
PAIRS = 3 * 5 + 7 * 25


@pytest.fixture(autouse=True)
def torch_2_11(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own formulas refuse grouped heads."""

    def refuse(*shapes: Any) -> int:
        raise AssertionError("batch/heads mismatch")

    for name in ("sdpa_flop_count", "sdpa_backward_flop_count"):
        monkeypatch.setattr(f"torch.utils.flop_counter.{name}", refuse)


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def counted(name: str, *args: Any, **kwargs: Any) -> int:
    space, operator = name.split(".")
    formula: Any = flop_counter().flop_registry[getattr(getattr(torch.ops, space), operator)]
    found: int = formula(*args, out_val=None, **kwargs)
    return found


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "fused"])
def test_sdpa_of_grouped_heads(kernel: str, groups: int) -> None:
    q, k, v = meta(B, H, Q, C), meta(B, groups, K, C), meta(B, groups, K, V)
    out, lse, seed = meta(B, H, Q, V), meta(B, H, Q), meta(2)
    name = f"aten._scaled_dot_product_{kernel}_attention{'_overrideable' * (kernel == 'fused')}"
    forward: dict[str, tuple[Any, ...]] = {
        "flash": (0.0, True, False),
        "efficient": (None, True, 0.0, True),
        "cudnn": (None, True, 0.0, True, False),
        "fused": (None, 0.0, True, False),
    }
    backward: dict[str, tuple[Any, ...]] = {
        "flash": (out, lse, None, None, Q, K, 0.0, True, seed, seed),
        "efficient": (None, out, lse, seed, seed, 0.0, [True, True, True, False], True),
        "cudnn": (out, lse, seed, seed, None, None, None, Q, K, 0.0, True),
        "fused": (None, [True, True, True, False], out, lse, None, None, Q, K, 0.0, True, seed, seed),
    }
    assert counted(name, q, k, v, *forward[kernel], scale=None) == FORWARD
    assert counted(f"{name}_backward", meta(B, H, Q, V), q, k, v, *backward[kernel], scale=None) == BACKWARD


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_kernels_below_sdpa(groups: int) -> None:
    """Which have heads after the rows."""
    q, k, v = meta(B, Q, H, C), meta(B, K, groups, C), meta(B, K, groups, V)
    out, lse, seed = meta(B, Q, H, V), meta(B, H, Q), meta(2)
    assert counted("aten._flash_attention_forward", q, k, v, None, None, Q, K, 0.0, True, False) == FORWARD
    given = (out, q, k, v, out, lse, None, None, Q, K, 0.0, True, seed, seed)
    assert counted("aten._flash_attention_backward", *given) == BACKWARD
    assert counted("aten._efficient_attention_forward", q, k, v, None, None, None, None, None, 0.0, 1, True) == FORWARD
    given = (out, q, k, v, None, out, None, None, Q, K, lse, 0.0, seed, seed, 1, False)
    assert counted("aten._efficient_attention_backward", *given) == BACKWARD
    assert counted("aten._cudnn_attention_forward", q, k, v, None, None, None, Q, K, True, 0.0, True) == FORWARD
    given = (out, q, k, v, out, lse, seed, seed, None, None, None, Q, K, 0.0, True)
    assert counted("aten._cudnn_attention_backward", *given) == BACKWARD


def packed(groups: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], int, int]:
    """Two sequences of 3 and 7 queries with 5 and 25 keys, where they start, and their operations."""
    given = (meta(10, H, C), meta(30, groups, C), meta(30, groups, V))
    starts = torch.tensor(FIRST_Q, dtype=torch.int32), torch.tensor(FIRST_K, dtype=torch.int32)
    return given, starts, 2 * PAIRS * H * (C + V), 2 * PAIRS * H * (3 * C + 2 * V)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("torch_2_13", [False, True])
def test_varlen_of_grouped_heads(groups: int, torch_2_13: bool) -> None:
    """As torch 2.11 calls it and as 2.13 does, with more arguments at the end."""
    (q, k, v), starts, forward, backward = packed(groups)
    out, lse, seed = meta(10, H, V), meta(H, 10), meta(2)
    more: tuple[Any, ...] = (True, None, None, None) if torch_2_13 else ()
    assert counted("torch_attn._varlen_attn", q, k, v, *starts, 7, 25, True, None, [-1, 0], *more) == forward
    given = (out, q, k, v, out, lse, *starts, 7, 25, True, seed, None, [-1, 0])
    assert counted("torch_attn._varlen_attn_backward", *given, *more[:1]) == backward
    assert counted("aten._flash_attention_forward", q, k, v, *starts, 7, 25, 0.0, True, False) == forward
    given = (out, q, k, v, out, lse, *starts, 7, 25, 0.0, True, seed, seed)
    assert counted("aten._flash_attention_backward", *given) == backward


def test_packed_rows_of_other_kernels() -> None:
    """Which take a bias before the starts, and cuDNN's seeds before both."""
    (q, k, v), starts, forward, backward = packed(2)
    out, lse, seed = meta(10, H, V), meta(H, 10), meta(2)
    given: tuple[Any, ...] = (*(x[None] for x in (q, k, v)), None, *starts, 7, 25, 0.0, 1, True)
    assert counted("aten._efficient_attention_forward", *given) == forward
    given = (*(x[None] for x in (out, q, k, v)), None, out[None], *starts, 7, 25, lse, 0.0, seed, seed, 1, False)
    assert counted("aten._efficient_attention_backward", *given) == backward
    assert counted("aten._cudnn_attention_forward", q, k, v, None, *starts, 7, 25, True, 0.0, True) == forward
    given = (out, q, k, v, out, lse, seed, seed, None, *starts, 7, 25, 0.0, True)
    assert counted("aten._cudnn_attention_backward", *given) == backward


def test_varlen_whose_keys_start_with_the_queries() -> None:
    q, k, v = meta(10, H, C), meta(10, 2, C), meta(10, 2, V)
    starts = torch.tensor(FIRST_Q)
    assert counted("torch_attn._varlen_attn", q, k, v, starts, None, 7, 7) == 2 * (9 + 49) * H * (C + V)


def test_varlen_whose_starts_cannot_be_read_counts_the_longest() -> None:
    (q, k, v), starts, *_ = packed(2)
    unread = [start.to("meta") for start in starts]
    assert counted("torch_attn._varlen_attn", q, k, v, *unread, 7, 25) == 2 * 2 * 7 * 25 * H * (C + V)


def test_ours_counts_as_the_kernel_it_stands_for() -> None:
    """What runs where there is no flash kernel, forward and backward, while the counter looks."""
    from pal.backbone.varlen import segment_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, 8, generator=generator, requires_grad=True) for n, heads in ((10, 4), (30, 2), (30, 2))
    )
    starts = (torch.tensor(FIRST_Q, dtype=torch.int32), torch.tensor(FIRST_K, dtype=torch.int32))
    with flop_counter() as counter:
        out = segment_attention(q, k, v, *starts, 7, 25)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert (forward, counter.get_total_flops() - forward) == (2 * PAIRS * 4 * 16, 2 * PAIRS * 4 * 40)


def test_grouped_sdpa_runs_under_the_counter() -> None:
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 9, 8, requires_grad=True)
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 4 * 6 * 9 * 8
