"""The last linear layer of a projector, a layer's norm and its k and v projections as one product, for inference.

With u = W h + b, g the norm's weight and P the rows of k_proj and v_proj, `P (g * u) / rms(u)` is
`(P diag(g) (W h + b))` over the root mean square of u. The first is linear in h. So is what the second needs: with
`[W b] = Q R` and Q's columns orthonormal, `|u| = |R [h 1]|`. Nothing as wide as the LLM is made, which pays where h is
narrower than the LLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class FoldedKV:
    """h -> keys before k_norm and RoPE, and values, each [..., G C]."""

    weight_XM: Tensor
    """2 G C rows for keys and values, then those whose squares sum to that of u."""
    bias_X: Tensor
    width: int
    """D."""
    eps: float
    after_2K: Tensor | None
    """Biases of k_proj and v_proj."""
    made_of: tuple[Tensor, ...]
    versions: tuple[tuple[int, int], ...]

    def __call__(self, h_BAM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of h."""
        x_BAX = F.linear(h_BAM.to(self.weight_XM.dtype), self.weight_XM, self.bias_X)
        shared = 2 * self.kv_width
        scale_BA1 = (x_BAX[..., shared:].square().sum(-1, keepdim=True) / self.width + self.eps).rsqrt()
        kv_BAX = x_BAX[..., :shared] * scale_BA1
        if self.after_2K is not None:
            kv_BAX = kv_BAX + self.after_2K
        return kv_BAX[..., : self.kv_width], kv_BAX[..., self.kv_width :]

    @property
    def kv_width(self) -> int:
        """G C."""
        return (len(self.weight_XM) - self.weight_XM.shape[1] - 1) // 2

    def fresh(self) -> bool:
        """Whether the weights it was made of are still what they were."""
        return self.versions == _versions(self.made_of)


def pays(inside: int, width: int, kv_width: int) -> bool:
    """Whether the folded product is the smaller one: h of width `inside`, u of `width`."""
    return (inside + 1) * (2 * kv_width + inside + 1) < width * (inside + 2 * kv_width)


@torch.no_grad()
def fold(last: nn.Linear, norm: nn.Module, k_proj: nn.Module, v_proj: nn.Module) -> FoldedKV | None:
    """One product for all four; None where it would not be smaller, or where adapters stand beside k or v.

    Args:
        last: a projector's last layer, M -> D.
        norm: an RMSNorm of transformers.
        k_proj: D -> G C.
        v_proj: the same.
    """
    if type(k_proj) is not nn.Linear or type(v_proj) is not nn.Linear:
        return None
    if not pays(last.in_features, last.out_features, k_proj.out_features):
        return None
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps  # type: ignore[assignment]
    # Gemma's norms add one to their weight: a row of ones tells what the norm multiplies with
    gain_D = norm(torch.ones(1, last.out_features, device=last.weight.device))[0].double() * (1.0 + eps) ** 0.5
    bias_D = torch.zeros(last.out_features, device=last.weight.device) if last.bias is None else last.bias
    map_DN = torch.cat((last.weight, bias_D[:, None]), dim=1).double()
    project_XD = torch.cat((k_proj.weight, v_proj.weight)).double() * gain_D
    rows_XN = torch.cat((project_XD @ map_DN, torch.linalg.qr(map_DN, mode="r").R))
    made_of = tuple(_tensors((last, norm, k_proj, v_proj)))
    return FoldedKV(
        weight_XM=rows_XN[:, :-1].to(last.weight.dtype).contiguous(),
        bias_X=rows_XN[:, -1].to(last.weight.dtype),
        width=last.out_features,
        eps=eps,
        after_2K=None if k_proj.bias is None else torch.cat((k_proj.bias, v_proj.bias)).to(last.weight.dtype),
        made_of=made_of,
        versions=_versions(made_of),
    )


def _tensors(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    return (parameter for module in modules for parameter in module.parameters())


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Changes with every write to a tensor, and with its place."""
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)
