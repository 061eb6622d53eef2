"""Whisper's encoder out of files that CTranslate2's own converter wrote, against the model they were written from."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pal.convert import convert, read
from pal.errors import ConfigError
from pal.registry import build
from tests.convert.files import save_ct2, whisper


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ct2(whisper(), tmp_path_factory.mktemp("ct2") / "whisper")


def test_weights_and_sizes(good: Path, tmp_path: Path) -> None:
    for at, source in enumerate((good, good.parent)):  # the file, or its folder
        facts = convert(source, tmp_path / f"{at}", "ct2-whisper")
        built = build("encoder", {"name": "whisper", "path": str(tmp_path / f"{at}")})
        theirs = whisper().model.encoder
        for name in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins"):
            assert getattr(built.network.config, name) == getattr(theirs.config, name), name
        ours = built.network.state_dict()
        assert ours.keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours[name], tensor.half().float()), name
        assert facts["numbers"] == sum(tensor.numel() for tensor in ours.values())
        assert facts["left_out"] > 20  # of the decoder


def test_equal_to_the_encoder_of_ctranslate2(good: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    convert(good, tmp_path / "out", "ct2-whisper")
    ours = build("encoder", {"name": "whisper", "path": str(tmp_path / "out")}).eval().network
    theirs = ctranslate2.models.Whisper(str(good.parent), device="cpu", compute_type="float32", intra_threads=1)
    frames_BMF = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_BAE = ours(frames_BMF).last_hidden_state
    expected_BAE = torch.from_numpy(np.array(theirs.encode(ctranslate2.StorageView.from_array(frames_BMF.numpy()))))
    torch.testing.assert_close(x_BAE, expected_BAE, atol=2e-5, rtol=1e-5)


def test_float32_weights(tmp_path: Path) -> None:
    tensors = read(save_ct2(whisper(), tmp_path / "f", quantization=None), "ct2-whisper").tensors
    for name, tensor in whisper().model.encoder.state_dict().items():
        assert torch.equal(tensors[f"encoder.{name}"], tensor), name


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    for kind in ("int8", "int16"):
        file = save_ct2(whisper(), tmp_path / kind, quantization=kind)
        with pytest.raises(ConfigError, match="has integer weights; convert the model with float16 or float32"):
            read(file, "ct2-whisper")


def test_an_alias_is_the_variable_it_names(tmp_path: Path) -> None:
    model = whisper()
    for layer in model.model.encoder.layers:
        layer.load_state_dict(model.model.encoder.layers[0].state_dict())
    file = save_ct2(model, tmp_path / "equal")
    assert b"encoder/layer_1/ffn/linear_0/weight\0" in file.read_bytes()[-4000:]  # CTranslate2 stores equal ones once
    tensors = read(file, "ct2-whisper").tensors
    for name, tensor in model.model.encoder.state_dict().items():
        assert torch.equal(tensors[f"encoder.{name}"], tensor.half()), name


def of(name: str) -> bytes:
    """A variable's name as it is stored."""
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


K_BIAS = of("encoder/layer_0/self_attention/linear_0/bias") + struct.pack("<BIBI", 1, 48, 4, 96)
HEADS = of("encoder/num_heads")
CASES: dict[str, Callable[[bytes], bytes]] = {
    "is not in CTranslate2's format of version 6 .found: 7.": lambda data: b"\7" + data[1:],
    "is a TransformerSpecX, not a Whisper model": replaced(of("WhisperSpec"), of("TransformerSpecX")),
    "ends too early": lambda data: data[:-7],
    "ends too early: it is no model": lambda data: b"",
    "has 3 bytes behind its end": lambda data: data + b"abc",
    "lacks 'encoder/num_heads'": replaced(HEADS, of("encoder/num_headz")),
    "lacks 'encoder/conv2/bias'": replaced(of("encoder/conv2/bias"), of("encoder/conv2/bios")),
    "has a bias of the keys": lambda data: _with_bias_of_keys(data),
    "'encoder/num_heads' is of type 9": replaced(HEADS + b"\0\2", HEADS + b"\0\t"),
    "'encoder/num_heads' has 200 axes": replaced(HEADS + b"\0", HEADS + b"\xc8"),
    "'encoder/num_heads' has 2 bytes, which is not its shape": replaced(HEADS + b"\0\2", HEADS + b"\0\3"),
    "'encoder/num_heads' is not one whole number": replaced(HEADS + b"\0\2", HEADS + b"\0\4"),
    "string without its zero byte": replaced(of("encoder/conv1/bias"), of("encoder/conv1/bias")[:-1] + b"x"),
}


def _with_bias_of_keys(data: bytes) -> bytes:
    assert K_BIAS in data
    at = data.index(K_BIAS) + len(K_BIAS) + 2 * 16  # behind the 16 of q, 2 bytes each
    assert data[at : at + 32] == bytes(32)
    return data[:at] + b"\0\x3c" + data[at + 2 :]


@pytest.mark.parametrize("message", CASES)
def test_other_and_damaged_files_are_refused(message: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(CASES[message](good.read_bytes()))
    with pytest.raises(ConfigError, match=message) as caught:
        convert(tmp_path / "model.bin", tmp_path / "out", "ct2-whisper")
    assert str(tmp_path / "model.bin") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_cut_is_noticed(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for size in [*range(60), *range(60, len(data), 611)]:
        (tmp_path / "model.bin").write_bytes(data[:size])
        with pytest.raises(ConfigError, match="ends too early"):
            read(tmp_path / "model.bin", "ct2-whisper")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'model.bin'}: no such file; give the model.bin")):
        read(tmp_path, "ct2-whisper")
