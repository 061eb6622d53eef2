"""What every connector must keep, and each against a plain reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pal.connectors.base import Connector
from pal.errors import ConfigError
from pal.registry import build
from pal.types import AudioFeatures

WIDTH = 12
OPTIONS: list[dict[str, Any]] = [
    {"name": "mlp"},
    {"name": "mlp", "width": 7, "hidden": 20, "norm": False},
    {"name": "strided_conv"},
    {"name": "strided_conv", "stride": 1, "kernel": 3},
    {"name": "strided_conv", "stride": 2, "kernel": 5, "width": 7, "norm": False},
    {"name": "conv_transformer"},
    {
        "name": "conv_transformer",
        "stride": 3,
        "kernel": 5,
        "layers": 1,
        "inner": 10,
        "heads": 2,
        "hidden": 11,
        "width": 7,
    },
    {"name": "qformer", "queries": 4, "layers": 3, "heads": 2},
    {"name": "qformer", "queries": 2, "layers": 2, "heads": 3, "window_seconds": 0.4, "width": 9},
    {"name": "qformer", "queries": 3, "layers": 2, "cross_attention_every": 1, "positions": False},
]
IDS = [" ".join(str(value) for value in options.values()) for options in OPTIONS]
each = pytest.mark.parametrize("options", OPTIONS, ids=IDS)


def make(options: dict[str, Any], width: int = WIDTH) -> Connector:
    torch.manual_seed(0)
    connector = build("connector", options, in_width=width).eval()
    for parameter in connector.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # biases too, so that a leak through them shows
    return connector


def batch(*lengths: int, seed: int = 0, width: int = WIDTH) -> AudioFeatures:
    """Clips of these lengths at 10 tokens a second; the padding is noise, louder than the clips."""
    generator = torch.Generator().manual_seed(seed)
    x_BAE = torch.randn(len(lengths), max(lengths), width, generator=generator)
    x_BAE[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] *= 100
    return AudioFeatures(x_BAE, lengths, 0.1)


def one(features: AudioFeatures, row: int) -> AudioFeatures:
    length = features.lengths[row]
    return AudioFeatures(features.x_BAE[row : row + 1, :length], (length,), 0.1)


@each
def test_a_padded_batch_equals_its_items(options: dict[str, Any]) -> None:
    connector = make(options)
    features = batch(11, 1, 4, 13, 8)
    together = connector(features)
    for row in range(5):
        alone = connector(one(features, row))
        assert alone.mask_BA.all()
        assert together.lengths[row] == alone.x_BAE.shape[1]
        assert alone.seconds_per_token == together.seconds_per_token
        assert_close(together.x_BAE[row][together.mask_BA[row]], alone.x_BAE[0], atol=1e-5, rtol=1e-5)


@each
def test_real_tokens_come_first_and_width_is_as_declared(options: dict[str, Any]) -> None:
    connector = make(options)
    out = connector(batch(11, 1, 4))
    assert out.x_BAE.shape[2] == connector.width == options.get("width", WIDTH)
    assert torch.equal(out.mask_BA, torch.arange(out.x_BAE.shape[1]) < torch.tensor(out.lengths)[:, None])


@each
def test_every_parameter_gets_a_gradient_and_padding_none(options: dict[str, Any]) -> None:
    connector = make(options).train()
    features = batch(11, 1, 4)
    features.x_BAE.requires_grad_()
    out = connector(features)
    out.x_BAE[out.mask_BA].square().sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        # the bias of keys moves all scores of a row alike: its gradient is zero by mathematics
        assert parameter.grad.abs().sum() > 0 or name.endswith("k.bias"), name
    assert features.x_BAE.grad is not None
    assert features.x_BAE.grad[~features.mask_BA].abs().sum() == 0
    assert (features.x_BAE.grad[features.mask_BA].abs().sum(1) > 0).all()


@each
def test_order_is_kept(options: dict[str, Any]) -> None:
    connector = make(options)
    features = batch(12)
    out = connector(features).x_BAE[0]
    flipped = connector(AudioFeatures(features.x_BAE.flip(1), features.lengths, 0.1)).x_BAE[0]
    if options["name"] == "mlp":
        assert_close(flipped, out.flip(0))
    elif options.get("positions") is False:
        assert_close(flipped, out)  # what the help of the option says
    else:
        assert (flipped - out).abs().max() > 1e-2
    changed = AudioFeatures(features.x_BAE.clone(), features.lengths, 0.1)
    changed.x_BAE[0, -1].neg_()
    moved = (connector(changed).x_BAE[0] - out).abs().sum(1) > 1e-5
    if options["name"] == "conv_transformer":
        assert moved.all()
    elif options["name"] != "qformer":
        assert moved[-1] and not moved[: len(moved) // 2].any()
    elif "window_seconds" in options:
        assert moved.tolist() == [False] * 4 + [True] * 2
    else:
        assert moved.all()


def test_mlp_against_plain_arithmetic() -> None:
    connector = make({"name": "mlp", "width": 5, "hidden": 9})
    features = batch(6, 3)
    weights = dict(connector.named_parameters())
    x = norm(features.x_BAE, weights, "layers.0")
    x = x @ weights["layers.1.weight"].T + weights["layers.1.bias"]
    x = gelu(x) @ weights["layers.3.weight"].T + weights["layers.3.bias"]
    out = connector(features)
    assert_close(out.x_BAE, x)
    assert out.lengths == features.lengths
    assert out.seconds_per_token == 0.1


@pytest.mark.parametrize(("stride", "kernel"), [(3, 3), (2, 5), (1, 3), (4, 5)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 12])
def test_strided_conv_against_sums_over_its_window(stride: int, kernel: int, length: int) -> None:
    connector = make({"name": "strided_conv", "stride": stride, "kernel": kernel})
    features = batch(length, 12)
    weights = dict(connector.named_parameters())
    x_AE = norm(features.x_BAE[0, :length], weights, "norm")
    rows = []
    for token in range(math.ceil(length / stride)):
        total = weights["conv.bias"].clone()
        for tap in range(kernel):
            place = token * stride + tap - (kernel - stride) // 2
            if 0 <= place < length:
                total = total + weights["conv.weight"][:, :, tap] @ x_AE[place]
        rows.append(total)
    out = connector(features)
    assert out.lengths == (math.ceil(length / stride), math.ceil(12 / stride))
    assert_close(out.x_BAE[0, : len(rows)], torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert out.seconds_per_token == pytest.approx(0.1 * stride)


def test_conv_transformer_against_torchs_layers() -> None:
    connector = make({"name": "conv_transformer", "stride": 2, "layers": 2, "inner": 8, "heads": 2, "hidden": 20})
    features = batch(7, 12)
    own = connector.state_dict()
    conv = make({"name": "strided_conv", "stride": 2, "width": 8})
    conv.load_state_dict({name.removeprefix("conv."): x for name, x in own.items() if name.startswith("conv.")})
    tokens = conv(features)
    x = tokens.x_BAE
    for i in range(2):
        layer = nn.TransformerEncoderLayer(8, 2, 20, 0.0, "gelu", batch_first=True, norm_first=True)
        part = {name.removeprefix(f"layers.{i}."): x for name, x in own.items() if name.startswith(f"layers.{i}.")}
        given = {
            "self_attn.in_proj_weight": torch.cat([part[f"attention.{name}.weight"] for name in "qkv"]),
            "self_attn.in_proj_bias": torch.cat([part[f"attention.{name}.bias"] for name in "qkv"]),
            "self_attn.out_proj.weight": part["attention.out.weight"],
            "self_attn.out_proj.bias": part["attention.out.bias"],
        }
        for name, place in {"norm1": "norm", "norm2": "ffn.0", "linear1": "ffn.1", "linear2": "ffn.3"}.items():
            given |= {f"{name}.{kind}": part[f"{place}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(given)
        x = layer(x, src_key_padding_mask=~tokens.mask_BA)
    x = norm(x, own, "out.0") @ own["out.1.weight"].T + own["out.1.bias"]
    out = connector(features)
    assert (out.lengths, out.seconds_per_token) == (tokens.lengths, tokens.seconds_per_token) == ((4, 6), 0.2)
    assert_close(out.x_BAE[out.mask_BA], x[out.mask_BA], atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training_only() -> None:
    connector = make({"name": "conv_transformer", "dropout": 0.5})
    features = batch(9)
    assert torch.equal(connector(features).x_BAE, connector(features).x_BAE)
    connector.train()
    assert not torch.equal(connector(features).x_BAE, connector(features).x_BAE)


@pytest.mark.parametrize("every", [1, 2])
def test_qformer_against_plain_attention(every: int) -> None:
    connector = make({"name": "qformer", "queries": 3, "layers": 3, "heads": 2, "cross_attention_every": every})
    features = batch(7, 4)
    weights = dict(connector.named_parameters())
    for row, length in enumerate((7, 4)):
        audio = norm(features.x_BAE[row, :length], weights, "audio_norm")
        for place in range(length):
            for index in range(6):
                angle = place * 10_000 ** (-index / 5)
                audio[place, index] += math.sin(angle)
                audio[place, index + 6] += math.cos(angle)
        s = norm(weights["queries_SE"], weights, "query_norm")
        for layer in range(3):
            at = f"blocks.{layer}"
            s = norm(s + attention(s, s, weights, f"{at}.self_attention"), weights, f"{at}.self_norm")
            if layer % every == 0:
                s = norm(s + attention(s, audio, weights, f"{at}.cross_attention"), weights, f"{at}.cross_norm")
            else:
                assert f"{at}.cross_attention.q.weight" not in weights
            inner = gelu(s @ weights[f"{at}.ffn.0.weight"].T + weights[f"{at}.ffn.0.bias"])
            s = norm(
                s + inner @ weights[f"{at}.ffn.2.weight"].T + weights[f"{at}.ffn.2.bias"], weights, f"{at}.ffn_norm"
            )
        assert_close(connector(features).x_BAE[row], s, atol=1e-5, rtol=1e-5)


def test_qformer_number_of_queries() -> None:
    fixed = make({"name": "qformer", "queries": 5})(batch(11, 1))
    assert (fixed.lengths, fixed.seconds_per_token) == ((5, 5), 0.0)
    grows = make({"name": "qformer", "queries": 2, "window_seconds": 0.4})(batch(11, 1, 4, 5))
    assert grows.lengths == (6, 2, 2, 4)  # two for each 4 tokens begun
    assert grows.seconds_per_token == pytest.approx(0.2)


def test_qformer_windows_are_clips_of_their_own() -> None:
    windowed = make({"name": "qformer", "queries": 2, "window_seconds": 0.4})
    whole = make({"name": "qformer", "queries": 2})
    features = batch(11)
    pieces = [AudioFeatures(x, (x.shape[1],), 0.1) for x in features.x_BAE.split(4, 1)]
    assert_close(windowed(features).x_BAE, torch.cat([whole(piece).x_BAE for piece in pieces], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "strided_conv", "stride": 3, "kernel": 2}, "would skip tokens"),
        ({"name": "strided_conv", "stride": 0}, "stride"),
        ({"name": "qformer", "width": 10, "heads": 3}, "not divisible"),
        ({"name": "qformer", "heads": 5}, "not divisible"),
        ({"name": "qformer", "query": 5}, "unknown key 'query'; known: "),
        ({"name": "mlpp"}, "unknown connector 'mlpp'; known: .*mlp.*qformer.*strided_conv"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("connector", options, in_width=WIDTH)


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, keys: Tensor, weights: dict[str, Tensor], name: str, heads: int = 2) -> Tensor:
    q, k, v = (
        y @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]
        for y, part in ((x, "q"), (keys, "k"), (keys, "v"))
    )
    size = q.shape[1] // heads
    mixed = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(size)
        mixed.append(torch.softmax(scores, 1) @ v[:, columns])
    return torch.cat(mixed, 1) @ weights[f"{name}.out.weight"].T + weights[f"{name}.out.bias"]
