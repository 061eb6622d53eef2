"""AST, against transformers' own extractor and model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel

from pal.encoders.ast import AST
from pal.errors import ConfigError
from pal.registry import build

RATE = 16_000


def tiny(**fields: Any) -> ASTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ASTConfig(**sizes | {"max_length": 128} | fields)


def saved(folder: Path, config: ASTConfig, kind: type = ASTModel) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)  # large enough that a token out of place shows
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("ast"), tiny())


@pytest.fixture(scope="module")
def encoder(folder: Path) -> AST:
    return build("encoder", {"name": "ast", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, length).astype(np.float32))


def full(samples_N: Tensor) -> Tensor:
    """The clip with zeros behind it, up to where Kaldi's last frame is full."""
    length = len(samples_N)
    return torch.nn.functional.pad(samples_N, (0, 400 - length if length < 400 else -(length - 400) % 160))


def reference(folder: Path, samples_N: Tensor, **numbers: float) -> tuple[Tensor, Tensor]:
    """Frames [F, M] and tokens [A, E] of transformers for one window, those of 100 ms after another."""
    model = ASTModel.from_pretrained(folder).eval()
    size = model.config.max_length
    extractor = ASTFeatureExtractor(max_length=size, **numbers)
    inputs = extractor(full(samples_N).numpy(), sampling_rate=RATE, return_tensors="pt").input_values
    with torch.no_grad():
        states_AE = model(inputs).last_hidden_state[0]
    steps = (size - 16) // 10 + 1
    tokens = [states_AE[2 + band * steps + step] for step in range(-(-len(samples_N) // 1600)) for band in range(12)]
    return inputs[0], torch.stack(tokens)


# those of which Kaldi's last frame is full are taken as they are
LENGTHS = [1, 240, 399, 400, 560, 1_600, 1_601, 8_080, 12_345, 19_199, 19_200]


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_and_tokens_equal_transformers(folder: Path, encoder: AST, length: int) -> None:
    samples_N = clip(length)
    frames_FM, tokens_AE = reference(folder, samples_N)
    found_FM = encoder.frontend(samples_N)
    assert len(found_FM) == -(-length // 160)
    assert_close(found_FM, frames_FM[: len(found_FM)], atol=1e-4, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    assert features.lengths == (len(tokens_AE),)
    assert_close(features.x_BAE[0], tokens_AE, atol=1e-5, rtol=1e-5)


def test_ten_seconds_at_the_published_shape(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(max_length=1024, num_hidden_layers=1))
    encoder = AST(AST.Config(path=str(folder))).eval()
    assert encoder.window_seconds == pytest.approx(10.1)
    assert encoder.seconds_per_token == pytest.approx(0.1 / 12)
    samples_N = clip(10 * RATE)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(163_840, 1)])
    assert features.lengths == (1200, 1236)
    assert_close(features.x_BAE[0, :1200], reference(folder, samples_N)[1], atol=1e-5, rtol=1e-5)


def test_a_padded_batch_equals_its_clips(folder: Path, encoder: AST) -> None:
    clips = [clip(length, seed, level) for seed, (length, level) in enumerate([(19_200, 1e-3), (4_001, 1.0), (1, 0.1)])]
    with torch.no_grad():
        features = encoder.encode(clips)
    for row, samples_N in enumerate(clips):
        tokens_AE = reference(folder, samples_N)[1]
        assert_close(features.x_BAE[row][features.mask_BA[row]], tokens_AE, atol=1e-5, rtol=1e-5)


def test_windows_lose_nothing(folder: Path, encoder: AST) -> None:
    assert encoder.window_seconds == pytest.approx(1.2)
    samples_N = clip(45_000)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(1_600)])
    assert features.lengths == (12 * 12 + 12 * 12 + 12 * 5, 12)
    assert features.lengths[0] * features.seconds_per_token >= 45_000 / RATE
    expected = torch.cat([reference(folder, window_N)[1] for window_N in samples_N.split(19_200)])
    assert_close(features.x_BAE[0], expected, atol=1e-5, rtol=1e-5)


def test_mean_over_frequencies(folder: Path, encoder: AST) -> None:
    mean = build("encoder", {"name": "ast", "path": str(folder), "frequency": "mean"}).eval()
    clips = [clip(20_000), clip(3_000)]
    with torch.no_grad():
        each, means = encoder.encode(clips), mean.encode(clips)
    assert (means.lengths, means.seconds_per_token) == ((13, 2), pytest.approx(0.1))
    assert_close(means.x_BAE[0], each.x_BAE[0].unflatten(0, (-1, 12)).mean(1))


def test_other_statistics(folder: Path) -> None:
    numbers = {"mean": -6.845978, "std": 5.5654526}  # those of the models for speech commands
    encoder = build("encoder", {"name": "ast", "path": str(folder), **numbers}).eval()
    with torch.no_grad():
        found_AE = encoder.encode([clip(5_000)]).x_BAE[0]
    assert_close(found_AE, reference(folder, clip(5_000), **numbers)[1], atol=1e-5, rtol=1e-5)


def test_a_classifier_gives_the_same_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(num_labels=3), ASTForAudioClassification)
    ours = AST(AST.Config(path=str(folder)))
    model = ASTForAudioClassification.from_pretrained(folder).audio_spectrogram_transformer
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.network.state_dict()[name]), name


def test_a_bundle_rebuilds_it_without_the_folder(folder: Path, encoder: AST) -> None:
    options = {"name": "ast"} | encoder.standalone_config().model_dump(mode="json")
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = AST(AST.Config(architecture=tiny().to_dict()))
    features = encoder.encode([clip(20_000), clip(500)])
    features.x_BAE[features.mask_BA].square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_bfloat16() -> None:
    encoder = AST(AST.Config(architecture=tiny().to_dict())).to(torch.bfloat16)
    assert encoder.encode([clip(8_000)]).x_BAE.dtype == torch.bfloat16


def test_what_is_no_ast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'path'"):
        build("encoder", "ast")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="found: llama"):
        build("encoder", {"name": "ast", "path": str(tmp_path)})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build("encoder", {"name": "ast", "path": str(tmp_path / "missing")})
    with pytest.raises(ConfigError, match="without gaps"):
        AST(AST.Config(architecture=tiny(time_stride=20).to_dict()))
    folder = saved(tmp_path / "a", tiny())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "position_embeddings" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of the encoder, such as .*position_embeddings"):
        build("encoder", {"name": "ast", "path": str(folder)})
