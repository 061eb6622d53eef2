"""Whisper's encoder from a model of CTranslate2, read by its binary format of version 6.

The format is that of `ModelSpec._serialize` in CTranslate2's Python package. Little-endian: u32 version; the
specification's name and u32 revision; u32 count of variables; of each its name, u8 rank, u32 sizes, u8 type, u32 bytes
and the data; u32 count of aliases; of each its name and that of its variable. A string is a u16 length, which counts
the zero byte at its end, and the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pal.convert.folder import Converted
from pal.errors import ConfigError

_FILE = "model.bin"
_VERSION = 6
_SPECIFICATION = "WhisperSpec"
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_FLOATS = (0, 4)
_LARGEST_RANK = 8


@dataclass(frozen=True)
class Ct2Variable:
    """Variable of a CTranslate2 model: shape, type and place in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int
    """Position of the data, in bytes."""


def read_whisper(source: Path) -> Converted:
    """The encoder of a Whisper model of CTranslate2, by transformers' names, in the float type of the file.

    Args:
        source: `model.bin`, or the folder with it.

    Raises:
        ConfigError: another version or model, a damaged file, or integer weights.
    """
    file = source / _FILE if source.is_dir() else source
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give the {_FILE} of a Whisper model of CTranslate2, or its folder")
    model = _Ct2Model(file)
    layers = len({name.split("/")[1] for name in model.variables if name.startswith("encoder/layer_")} - {"layer_norm"})
    tensors = _convolutions(model)
    for layer in range(max(layers, 1)):  # without layers, the error names the first weight missing
        tensors |= _layer(model, f"encoder/layer_{layer}/", f"encoder.layers.{layer}.")
    tensors |= _norm(model, "encoder/layer_norm", "encoder.layer_norm")
    width, mels, _ = tensors["encoder.conv1.weight"].shape
    config = {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": model.integer("encoder/num_heads"),
        "encoder_ffn_dim": len(tensors["encoder.layers.0.fc1.weight"]),
        "num_mel_bins": mels,
        "max_source_positions": len(tensors["encoder.embed_positions.weight"]),
    }
    return Converted(config, tensors, left_out=sum(not name.startswith("encoder/") for name in model.variables))


def _convolutions(model: _Ct2Model) -> dict[str, Tensor]:
    """The two convolutions and the fixed positions."""
    tensors = {"encoder.embed_positions.weight": model.tensor("encoder/position_encodings/encodings", 2)}
    for name in ("conv1", "conv2"):
        tensors[f"encoder.{name}.weight"] = model.tensor(f"encoder/{name}/weight", 3)
        tensors[f"encoder.{name}.bias"] = model.tensor(f"encoder/{name}/bias", 1)
    return tensors


def _layer(model: _Ct2Model, theirs: str, ours: str) -> dict[str, Tensor]:
    """The weights of a layer; CTranslate2 has the q, k and v projections in one matrix, one below the other."""
    tensors = {}
    weight_EE3 = model.tensor(f"{theirs}self_attention/linear_0/weight", 2)
    bias_E3 = model.tensor(f"{theirs}self_attention/linear_0/bias", 1)
    width = weight_EE3.shape[1]
    if len(weight_EE3) != 3 * width or len(bias_E3) != 3 * width:
        raise model.error(f"'{theirs}self_attention/linear_0' is not made of three square projections")
    for name, weight_EE, bias_E in zip("qkv", weight_EE3.split(width), bias_E3.split(width), strict=True):
        tensors[f"{ours}self_attn.{name}_proj.weight"] = weight_EE
        if name != "k":
            tensors[f"{ours}self_attn.{name}_proj.bias"] = bias_E
        elif bias_E.any():  # Whisper's k projection has no bias
            raise model.error(f"'{theirs}self_attention/linear_0/bias' has a bias of the keys, unlike Whisper")
    for their_name, our_name in (
        ("self_attention/linear_1", "self_attn.out_proj"),
        ("ffn/linear_0", "fc1"),
        ("ffn/linear_1", "fc2"),
    ):
        tensors[f"{ours}{our_name}.weight"] = model.tensor(f"{theirs}{their_name}/weight", 2)
        tensors[f"{ours}{our_name}.bias"] = model.tensor(f"{theirs}{their_name}/bias", 1)
    tensors |= _norm(model, f"{theirs}self_attention/layer_norm", f"{ours}self_attn_layer_norm")
    return tensors | _norm(model, f"{theirs}ffn/layer_norm", f"{ours}final_layer_norm")


def _norm(model: _Ct2Model, theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": model.tensor(f"{theirs}/gamma", 1), f"{ours}.bias": model.tensor(f"{theirs}/beta", 1)}


class _Ct2Model:
    """A model file; its variables are read when they are asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        # an empty file cannot be mapped
        self._data = np.memmap(file, np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
        self._position = 0
        version = self._number("I")
        if version != _VERSION:
            raise self.error(f"is not in CTranslate2's format of version {_VERSION} (found: {version})")
        name, _ = self._text(), self._number("I")
        if name != _SPECIFICATION:
            raise self.error(f"is a {name or 'model without a name'}, not a Whisper model ({_SPECIFICATION})")
        self.variables = dict(self._variable() for _ in range(self._number("I")))
        for _ in range(self._number("I")):
            alias, target = self._text(), self._text()
            if target not in self.variables:
                raise self.error(f"names '{target}', which it does not hold, as '{alias}'; fetch it again")
            self.variables[alias] = self.variables[target]
        if self._position != len(self._data):
            raise self.error(f"has {len(self._data) - self._position} bytes behind its end; fetch it again")

    def tensor(self, name: str, rank: int) -> Tensor:
        """A copy of a variable of floating-point type and the given rank."""
        variable = self._found(name)
        if variable.type not in _FLOATS:
            raise self.error(f"'{name}' has integer weights; convert the model with float16 or float32 weights")
        if len(variable.shape) != rank or 0 in variable.shape:
            raise self.error(f"'{name}' has shape {list(variable.shape)}, not {rank} axes; is it a Whisper model?")
        return torch.from_numpy(self._array(variable).copy())

    def integer(self, name: str) -> int:
        """A variable that is one whole number."""
        variable = self._found(name)
        if variable.type in _FLOATS or variable.shape not in ((), (1,)):
            raise self.error(f"'{name}' is not one whole number; is it a Whisper model?")
        return int(self._array(variable).item())

    def error(self, message: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self.file}: {message}")

    def _found(self, name: str) -> Ct2Variable:
        if name not in self.variables:
            raise self.error(f"lacks '{name}'; is it a Whisper model of CTranslate2?")
        return self.variables[name]

    def _array(self, variable: Ct2Variable) -> np.ndarray:
        kind = np.dtype(_TYPES[variable.type])
        size = int(np.prod(variable.shape, dtype=np.int64)) * kind.itemsize
        return self._data[variable.offset : variable.offset + size].view(kind).reshape(variable.shape)

    def _variable(self) -> tuple[str, Ct2Variable]:
        name = self._text()
        rank = self._number("B")
        if rank > _LARGEST_RANK:
            raise self.error(f"'{name}' has {rank} axes; the file is damaged, fetch it again")
        shape = tuple(self._number("I") for _ in range(rank))
        kind, size = self._number("B"), self._number("I")
        if kind not in _TYPES:
            raise self.error(f"'{name}' is of type {kind}, which the format does not have; fetch it again")
        count = 1
        for length in shape:
            count *= length
        if size != count * np.dtype(_TYPES[kind]).itemsize:
            raise self.error(f"'{name}' has {size} bytes, which is not its shape {list(shape)}; fetch it again")
        offset = self._position
        self._take(size)
        return name, Ct2Variable(shape, kind, offset)

    def _text(self) -> str:
        raw = self._take(self._number("H")).tobytes()
        if not raw.endswith(b"\0"):
            raise self.error("has a string without its zero byte; the file is damaged, fetch it again")
        return raw[:-1].decode(errors="replace")

    def _number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")).tobytes())[0])

    def _take(self, size: int) -> np.ndarray:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise self.error("ends too early: it is no model of CTranslate2, or was cut; fetch it again")
        return self._data[start : self._position]
