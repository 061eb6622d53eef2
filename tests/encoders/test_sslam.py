"""SSLAM, against an independent implementation of its description in plain matrix products."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import ASTFeatureExtractor

from pal.encoders.sslam import Sslam
from pal.errors import ConfigError
from pal.registry import build
from tests.encoders.published import SSLAM, save_sslam, sslam_tensors

RATE = 16_000
EXTRACTOR = ASTFeatureExtractor(do_normalize=False, max_length=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sslam(tmp_path_factory.mktemp("sslam"), sslam_tensors())


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Sslam:
    return build("encoder", {"name": "sslam", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.05, level, length).astype(np.float32))


def norm(x_AE: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    centred_AE = x_AE - x_AE.mean(1, keepdim=True)
    scale_A1 = (centred_AE.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    return centred_AE * scale_A1 * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x_AE: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x_AE @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def frames_of(samples_N: Tensor) -> Tensor:
    """[1024, M] as SSLAM's own script makes them, with zeros in what of the last frame is missing."""
    length = len(samples_N)
    samples_N = samples_N - samples_N.mean()
    samples_N = torch.nn.functional.pad(samples_N, (0, 400 - length if length < 400 else -(length - 400) % 160))
    frames_FM = torch.from_numpy(np.asarray(EXTRACTOR(samples_N.numpy(), sampling_rate=RATE)["input_values"][0]))
    return (frames_FM - -4.268) / (4.569 * 2)


def reference(tensors: dict[str, Tensor], frames_FM: Tensor, heads: int = 4) -> Tensor:
    """The tokens [64, 8, E] of one window, by step and frequency."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    kernel_EX = tensors["local_encoder.proj.weight"].flatten(1)
    rows = []
    for step in range(64):
        for band in range(8):
            patch_FM = frames_FM.double()[16 * step : 16 * step + 16, 16 * band : 16 * band + 16]
            rows.append(kernel_EX @ patch_FM.flatten() + tensors["local_encoder.proj.bias"])
    x_AE = torch.stack(rows) + tensors["fixed_positional_encoder.positions"][0, :512]
    x_AE = norm(torch.cat([tensors["extra_tokens"][0], x_AE]), tensors, "pre_norm")
    width = x_AE.shape[1] // heads
    for at in range(sum(name.endswith("mlp.fc1.weight") for name in tensors)):
        qkv_AX = linear(x_AE, tensors, f"blocks.{at}.attn.qkv")
        heard = []
        for head in range(heads):
            q_AC, k_AC, v_AC = (qkv_AX[:, part * heads * width + head * width :][:, :width] for part in range(3))
            heard.append((q_AC @ k_AC.T / math.sqrt(width)).softmax(1) @ v_AC)
        x_AE = norm(
            x_AE + linear(torch.cat(heard, 1), tensors, f"blocks.{at}.attn.proj"), tensors, f"blocks.{at}.norm1"
        )
        inner_AX = linear(x_AE, tensors, f"blocks.{at}.mlp.fc1")
        inner_AX = 0.5 * inner_AX * (1 + torch.erf(inner_AX / math.sqrt(2)))
        x_AE = norm(x_AE + linear(inner_AX, tensors, f"blocks.{at}.mlp.fc2"), tensors, f"blocks.{at}.norm2")
    return x_AE[1:].float().unflatten(0, (64, 8))


def tokens_of(tensors: dict[str, Tensor], samples_N: Tensor) -> Tensor:
    return reference(tensors, frames_of(samples_N))[: -(-len(samples_N) // 2560)].flatten(0, 1)


@pytest.mark.parametrize("length", [1, 400, 2_560, 2_561, 16_080, 100_000, 163_840])
def test_equals_the_description(encoder: Sslam, length: int) -> None:
    samples_N = clip(length)
    frames_FM = encoder.frontend(samples_N)
    assert len(frames_FM) == -(-length // 160)
    assert_close(frames_FM, frames_of(samples_N)[: len(frames_FM)], atol=1e-4, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    expected_AE = tokens_of(sslam_tensors(), samples_N)
    assert features.lengths == (len(expected_AE),) == (8 * -(-length // 2560),)
    assert_close(features.x_BAE[0], expected_AE, atol=1e-4, rtol=1e-4)


def test_the_published_size() -> None:
    with torch.device("meta"):
        encoder = build("encoder", {"name": "sslam", "architecture": {}})
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert parameters == 85_254_144
    assert f"{parameters / 1e6:.2f}" == "85.25"
    assert (encoder.width, encoder.seconds_per_token, encoder.window_seconds) == (768, 0.02, 10.24)
    assert {name: tensor.shape for name, tensor in encoder.network.state_dict().items()} == {
        name: tensor.shape for name, tensor in sslam_tensors(768, 12, torch.empty(1, 512, 768)).items()
    }


def test_positions_are_sines_and_cosines_of_frequency_then_step() -> None:
    encoder = Sslam(Sslam.Config(architecture={**SSLAM, "embed_dim": 24}))
    found_AE = encoder.network.fixed_positional_encoder.positions[0]
    for step, band in [(0, 0), (0, 5), (1, 0), (63, 7), (40, 3)]:
        expected = []
        for place in (band, step):
            rates = [10_000 ** (-i / 6) for i in range(6)]
            expected += [math.sin(place * rate) for rate in rates] + [math.cos(place * rate) for rate in rates]
        assert_close(found_AE[step * 8 + band], torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_file_without_positions_has_the_same(tmp_path: Path) -> None:
    fresh = Sslam(Sslam.Config(architecture=SSLAM))
    own = fresh.network.fixed_positional_encoder.positions
    tensors = sslam_tensors()
    tensors.pop("fixed_positional_encoder.positions")
    read = Sslam(Sslam.Config(path=str(save_sslam(tmp_path, tensors))))
    assert torch.equal(read.network.fixed_positional_encoder.positions, own)


def mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


@pytest.mark.parametrize(("seconds", "hertz"), [(0.8, 400), (0.8, 5_000), (4.64, 400), (4.64, 2_000), (8.0, 7_000)])
def test_tokens_are_in_order_of_time_then_frequency(tmp_path: Path, seconds: float, hertz: float) -> None:
    # without blocks a token knows nothing but its own patch
    folder = save_sslam(tmp_path, sslam_tensors(depth=0), depth=0)
    encoder = build("encoder", {"name": "sslam", "path": str(folder)})
    quiet_N = clip(163_840, level=1e-3)
    event_N = quiet_N.clone()
    at_N = torch.arange(round(seconds * RATE) + 400, round((seconds + 0.16) * RATE) - 400)
    event_N[at_N] += torch.hann_window(len(at_N)) * torch.sin(2 * math.pi * hertz / RATE * at_N)
    with torch.no_grad():
        change_A = (encoder.encode([event_N]).x_BAE - encoder.encode([quiet_N]).x_BAE)[0].norm(dim=1)
    bin = round((mel(hertz) - mel(20)) / (mel(8_000) - mel(20)) * 129) - 1
    step = round(seconds / 0.16)
    assert int(change_A.argmax()) == step * 8 + bin // 16
    assert int(change_A.argmax()) // 8 * 8 * encoder.seconds_per_token == pytest.approx(seconds)
    assert torch.cat([change_A[: step * 8], change_A[(step + 1) * 8 :]]).max() < 1e-4 < change_A.max()


def test_a_padded_batch_equals_its_clips(encoder: Sslam) -> None:
    clips = [
        clip(length, seed, level) for seed, (length, level) in enumerate([(163_840, 1e-3), (9_001, 1.0), (1, 0.1)])
    ]
    with torch.no_grad():
        features = encoder.encode(clips)
    assert features.lengths == (512, 32, 8)
    for row, samples_N in enumerate(clips):
        found_AE = features.x_BAE[row][features.mask_BA[row]]
        assert_close(found_AE, tokens_of(sslam_tensors(), samples_N), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert_close(found_AE, encoder.encode([samples_N]).x_BAE[0], atol=1e-5, rtol=1e-5)


def test_windows_lose_nothing(encoder: Sslam) -> None:
    samples_N = clip(400_000)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(RATE)])
    assert features.lengths == (8 * 157, 8 * 7)
    assert features.lengths[0] * features.seconds_per_token >= 400_000 / RATE
    expected_AE = torch.cat([tokens_of(sslam_tensors(), window_N) for window_N in samples_N.split(163_840)])
    assert_close(features.x_BAE[0], expected_AE, atol=1e-4, rtol=1e-4)


def test_the_last_sample_of_a_window_is_heard(encoder: Sslam) -> None:
    samples_N = clip(163_840)
    click_N = samples_N.clone()
    click_N[-1] += 1
    with torch.no_grad():
        change = (encoder.encode([samples_N]).x_BAE - encoder.encode([click_N]).x_BAE).abs().max()
    assert change > 1e-2


def test_mean_over_frequencies(folder: Path, encoder: Sslam) -> None:
    mean = build("encoder", {"name": "sslam", "path": str(folder), "frequency": "mean"}).eval()
    clips = [clip(170_000), clip(3_000)]
    with torch.no_grad():
        each, means = encoder.encode(clips), mean.encode(clips)
    assert (means.lengths, means.seconds_per_token, means.x_BAE.shape[2]) == ((67, 2), 0.16, 16)
    assert_close(means.x_BAE[0], each.x_BAE[0].unflatten(0, (-1, 8)).mean(1))


def test_a_bundle_rebuilds_it_without_the_folder(encoder: Sslam) -> None:
    options = {"name": "sslam"} | json.loads(json.dumps(encoder.standalone_config().model_dump(mode="json")))
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    encoder = build("encoder", {"name": "sslam", "path": str(folder)})
    features = encoder.encode([clip(20_000), clip(500)])
    features.x_BAE[features.mask_BA].pow(3).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_bfloat16() -> None:
    encoder = Sslam(Sslam.Config(architecture=SSLAM)).to(torch.bfloat16)
    assert encoder.encode([clip(8_000)]).x_BAE.dtype == torch.bfloat16


def test_a_classifier_beside_the_encoder_is_left_out(tmp_path: Path, encoder: Sslam) -> None:
    tensors = sslam_tensors() | {"head.weight": torch.ones(527, 16), "fc_norm.weight": torch.ones(16)}
    tuned = build("encoder", {"name": "sslam", "path": str(save_sslam(tmp_path, tensors))})
    assert tuned.state_dict().keys() == encoder.state_dict().keys()


def test_what_is_no_sslam_is_refused(tmp_path: Path) -> None:
    def read(**fields: object) -> None:
        build("encoder", {"name": "sslam", "path": str(tmp_path / "s"), **fields})

    with pytest.raises(ConfigError, match="missing key 'path'"):
        build("encoder", "sslam")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*give a Hub id or a folder"):
        read()
    save_sslam(tmp_path / "s", sslam_tensors())
    with pytest.raises(ConfigError, match=r"unknown key 'architecture.dept'; known: .*depth"):
        read(architecture={"dept": 3})
    (tmp_path / "s" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config.json; give a folder that `pal convert` wrote"):
        read()
    for text, message in [("{", "is no JSON;"), ("[]", "is no JSON object"), ('{"depth": "x"}', "config.json: depth")]:
        (tmp_path / "s" / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read()
    for fields, message in [
        ({"depth": 3}, r"lacks 12 of 42 weights, such as 'blocks.2.attn.proj.bias'"),
        ({"depth": 1}, r"has 12 weights that .* no place for, such as 'blocks.1"),
        ({"embed_dim": 32}, r"has shape \(.*16.*\), its configuration asks for \(.*32.*\)"),
        ({"num_heads": 3}, "embed_dim 16 is no multiple of 4 and of num_heads 3"),
        ({"img_size": [1000, 128]}, r"img_size \(1000, 128\) is no multiple of patch_size 16"),
        ({"layer_norm_first": True}, "is pre-norm"),
        ({"stride": 10}, "overlapping patches"),
    ]:
        save_sslam(tmp_path / "s", sslam_tensors(), **fields)
        with pytest.raises(ConfigError, match=message):
            read()
    save_sslam(tmp_path / "s", sslam_tensors())
    file = tmp_path / "s" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.extra_tokens")
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="lacks 1 of 30 weights, such as 'extra_tokens'"):
        read()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        read()
