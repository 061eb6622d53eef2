"""What says that tensors are the same, whatever file or machine they come from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """SHA-256 over `about` and the names, types, shapes and bytes of the tensors, in hexadecimal."""
    content = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name].detach()
        content.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        content.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()
