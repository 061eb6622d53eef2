"""Checkpoints as they are published, at a tiny size with random weights; every name is written out here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SSLAM = {"embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0, "patch_size": 16, "img_size": [1024, 128]}
BEATS: dict[str, Any] = {
    "input_patch_size": 16,
    "embed_dim": 8,
    "conv_bias": False,
    "encoder_layers": 3,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "deep_norm": True,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "dropout": 0.1,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 20,
    "max_distance": 50,
    "gru_rel_pos": True,
}


class _Draw:
    """Random tensors, large enough that a weight in a wrong place shows."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, width: int, out: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(out, width), f"{name}.bias": self(out)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}


def sslam_tensors(width: int = 16, depth: int = 2, positions: Tensor | None = None) -> dict[str, Tensor]:
    """The Hub's layout, without the prefix."""
    draw = _Draw()
    tensors = {"local_encoder.proj.weight": draw(width, 1, 16, 16), "local_encoder.proj.bias": draw(width)}
    tensors |= {"extra_tokens": draw(1, 1, width), **draw.norm("pre_norm", width)}
    tensors["fixed_positional_encoder.positions"] = draw(1, 768 * 8, width) if positions is None else positions
    for at in range(depth):
        block = f"blocks.{at}"
        tensors |= draw.norm(f"{block}.norm1", width) | draw.norm(f"{block}.norm2", width)
        tensors |= draw.linear(f"{block}.attn.qkv", width, 3 * width) | draw.linear(f"{block}.attn.proj", width, width)
        tensors |= draw.linear(f"{block}.mlp.fc1", width, 4 * width) | draw.linear(f"{block}.mlp.fc2", 4 * width, width)
    return tensors


def sslam_fairseq(tensors: dict[str, Tensor], heads: int | None = 4) -> dict[str, Any]:
    """The same as a fairseq checkpoint, with the parts that are not the encoder's."""
    image = "modality_encoders.IMAGE"
    model: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            model[name] = tensor
        elif name.startswith("pre_norm."):
            model[f"{image}.context_encoder.norm.{name.removeprefix('pre_norm.')}"] = tensor
        else:
            model[f"{image}.{name}"] = tensor
    model[f"{image}.decoder.blocks.0.0.weight"] = torch.ones(3)
    model["_ema"] = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    cfg = {"model": {"_name": "data2vec_multi", **({"num_heads": heads} if heads else {})}}
    return {"args": None, "cfg": cfg, "model": model, "extra_state": {"epoch": 10}}


def save_sslam(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    hub = {"model_type": "eat", "stride": 16, "mel_bins": 128, "max_length": 768, "layer_norm_first": False}
    (folder / "config.json").write_text(json.dumps(hub | SSLAM | fields))
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def beats_tensors(cfg: dict[str, Any] = BEATS) -> dict[str, Tensor]:
    """The official layout, in which every layer has the same relative positions."""
    draw = _Draw()
    patch, width, inner = cfg["embed_dim"], cfg["encoder_embed_dim"], cfg["encoder_ffn_embed_dim"]
    heads, taps = cfg["encoder_attention_heads"], cfg["conv_pos"]
    tensors = {"patch_embedding.weight": draw(patch, 1, 16, 16), **draw.norm("layer_norm", patch)}
    tensors |= draw.linear("post_extract_proj", patch, width)
    tensors["encoder.pos_conv.0.bias"] = draw(width)
    tensors["encoder.pos_conv.0.weight_g"] = draw(1, 1, taps).abs() + 0.5
    tensors["encoder.pos_conv.0.weight_v"] = draw(width, width // cfg["conv_pos_groups"], taps)
    tensors |= draw.norm("encoder.layer_norm", width)
    shared = draw(cfg["num_buckets"], heads)
    for at in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{at}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= draw.linear(f"{layer}.self_attn.{part}", width, width)
        tensors |= draw.linear(f"{layer}.self_attn.grep_linear", width // heads, 8)
        tensors[f"{layer}.self_attn.grep_a"] = 1 + draw(1, heads, 1, 1)
        tensors[f"{layer}.self_attn.relative_attention_bias.weight"] = shared
        tensors |= draw.norm(f"{layer}.self_attn_layer_norm", width) | draw.norm(f"{layer}.final_layer_norm", width)
        tensors |= draw.linear(f"{layer}.fc1", width, inner) | draw.linear(f"{layer}.fc2", inner, width)
    return tensors


def save_beats(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BEATS | fields))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
