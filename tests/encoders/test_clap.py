"""CLAP's audio encoder, against transformers' own extractor and models."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    ClapAudioConfig,
    ClapAudioModel,
    ClapAudioModelWithProjection,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
)

from pal.encoders.clap import Clap
from pal.errors import ConfigError
from pal.registry import build

RATE = 48_000
STEP = 15_000
"""Samples of a time step of the last feature map: 10 s / 32."""


def tiny(**fields: Any) -> ClapAudioConfig:
    sizes = {"depths": [2, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "patch_embeds_hidden_size": 4}
    return ClapAudioConfig(**sizes | {"hidden_size": 32, "projection_dim": 8} | fields)


def randomize(model: torch.nn.Module) -> None:
    """Weights, and batch statistics like those of a spectrogram in dB, that show an error."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(-30, 5)
        elif name.endswith("running_var"):
            tensor.uniform_(100, 400)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3)


def saved(folder: Path, config: ClapAudioConfig) -> Path:
    model = ClapAudioModel(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "unfused"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("clap"), tiny(enable_fusion=request.param))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Clap:
    return build("encoder", {"name": "clap", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, length).astype(np.float32))


@cache
def network(folder: Path) -> ClapAudioModel:
    return ClapAudioModel.from_pretrained(folder).eval()


def reference(folder: Path, samples_N: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [F, M] and the feature map [E, 2, 32] of transformers for one window."""
    model = network(folder)
    fused = model.config.enable_fusion
    extractor = ClapFeatureExtractor(
        frequency_min=50, frequency_max=14_000, truncation="fusion" if fused else "rand_trunc"
    )
    features = extractor(samples_N.numpy(), sampling_rate=RATE, return_tensors="pt")
    assert features.input_features.shape == (1, 4 if fused else 1, 1001, 64)
    with torch.no_grad():
        output = model(features.input_features, is_longer=torch.tensor([[False]]))
    return features.input_features[0, 0], output.last_hidden_state[0]


def in_order_of_time(map_EXA: Tensor, steps: int) -> Tensor:
    """The first steps of a feature map as tokens, low half of the spectrum first."""
    return torch.stack([map_EXA[:, band, step] for step in range(steps) for band in range(2)])


LENGTHS = [1, 479, STEP, STEP + 1, 160_000, 240_001, 479_999, 480_000]


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_and_tokens_equal_transformers(folder: Path, encoder: Clap, length: int) -> None:
    samples_N = clip(length)
    frames_FM, map_EXA = reference(folder, samples_N)
    assert map_EXA.shape == (32, 2, 32)
    assert_close(encoder.frontend(samples_N)[:1001], frames_FM, atol=1e-5, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    steps = math.ceil(length / STEP)
    assert features.lengths == (2 * steps,)
    assert_close(features.x_BAE[0], in_order_of_time(map_EXA, steps), atol=1e-5, rtol=1e-5)


def test_silence_and_full_scale(folder: Path, encoder: Clap) -> None:
    for samples_N in (torch.zeros(9_000), torch.ones(9_000), torch.sin(torch.arange(48_000) * 0.3)):
        assert_close(encoder.frontend(samples_N)[:1001], reference(folder, samples_N)[0], atol=1e-5, rtol=0)


def test_sizes(encoder: Clap) -> None:
    assert (encoder.sampling_rate, encoder.window_seconds) == (RATE, 10.0)
    assert (encoder.width, encoder.seconds_per_token) == (32, 10 / 64)


def test_the_mean_of_all_tokens_is_what_clap_pools(folder: Path, encoder: Clap) -> None:
    frames_FM = reference(folder, clip(480_000))[0]
    channels = 4 if encoder.network.config.enable_fusion else 1
    with torch.no_grad():
        theirs = network(folder)(frames_FM.expand(1, channels, -1, -1), is_longer=torch.tensor([[False]]))
        ours = encoder.encode([clip(480_000)])
    assert ours.lengths == (64,)
    assert_close(ours.x_BAE.mean(1), theirs.pooler_output, atol=1e-5, rtol=1e-5)


def test_concatenated_halves(folder: Path, encoder: Clap) -> None:
    wide = build("encoder", {"name": "clap", "path": str(folder), "frequency": "concat"}).eval()
    assert (wide.width, wide.seconds_per_token) == (64, 10 / 32)
    samples_N = clip(24 * RATE)
    with torch.no_grad():
        narrow_A = encoder.encode([samples_N, clip(7)])
        wide_A = wide.encode([samples_N, clip(7)])
    assert narrow_A.lengths == (64 + 64 + 26, 2)
    assert wide_A.lengths == (32 + 32 + 13, 1)
    pairs = narrow_A.x_BAE[0].unflatten(0, (-1, 2))
    assert_close(wide_A.x_BAE[0], torch.cat([pairs[:, 0], pairs[:, 1]], 1), atol=1e-6, rtol=0)


def test_long_audio_in_a_batch_loses_nothing(folder: Path, encoder: Clap) -> None:
    kinds = [(24 * RATE + 1, 0.1), (480_000, 1e-3), (90_001, 1.0), (1, 0.5), (STEP, 0.1)]
    clips = [clip(length, seed, level) for seed, (length, level) in enumerate(kinds)]
    with torch.no_grad():
        features = encoder.encode(clips)
    assert features.lengths == (2 * (32 + 32 + 13), 64, 14, 2, 2)
    for row, samples_N in enumerate(clips):
        windows = [(reference(folder, w)[1], math.ceil(len(w) / STEP)) for w in samples_N.split(480_000)]
        expected = torch.cat([in_order_of_time(map_EXA, steps) for map_EXA, steps in windows])
        assert features.mask_BA[row, : len(expected)].all()
        assert_close(features.x_BAE[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_chance_has_no_part_in_it(encoder: Clap) -> None:
    # transformers' extractor marks a random clip as longer and cuts long ones at a random place
    clips = [clip(25 * RATE), clip(RATE), clip(2 * RATE)]
    results = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (np.random.get_state()[1].copy(), torch.get_rng_state())
        with torch.no_grad():
            results.append(encoder.encode(clips).x_BAE)
        assert np.array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("fused", [True, False])
def test_an_event_stands_at_its_time_and_in_its_half_of_the_spectrum(fused: bool) -> None:
    torch.manual_seed(0)
    # with the small weights of a fresh network a token is above all what stands at its place
    encoder = Clap(Clap.Config(architecture=tiny(enable_fusion=fused).to_dict())).eval()
    quiet = clip(480_000, level=1e-3)
    time_N = torch.arange(5_000) / RATE
    with torch.no_grad():
        silent_AE = encoder.encode([quiet]).x_BAE[0]
        for step in (0, 7, 8, 18, 31):
            for band, hertz in enumerate((300, 9_000)):
                loud = quiet.clone()
                loud[step * STEP + 5_000 : step * STEP + 10_000] += torch.sin(2 * math.pi * hertz * time_N)
                change_A = (encoder.encode([loud]).x_BAE[0] - silent_AE).norm(dim=1)
                assert change_A.argmax() == 2 * step + band, (step, hertz)


@pytest.mark.parametrize("kind", [ClapModel, ClapAudioModelWithProjection, ClapAudioModel])
def test_each_kind_of_checkpoint_gives_the_same_weights(tmp_path: Path, kind: type) -> None:
    config: Any = tiny(enable_fusion=True)
    if kind is ClapModel:
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        text |= {"vocab_size": 16, "max_position_embeddings": 8}
        config = ClapConfig(audio_config=config.to_dict(), text_config=text, projection_dim=8)
    whole = kind(config)
    randomize(whole)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs = (whole if kind is ClapAudioModel else whole.audio_model).state_dict()
    ours = Clap(Clap.Config(path=str(tmp_path))).network.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_bundle_rebuilds_it_without_the_folder(folder: Path) -> None:
    encoder = build("encoder", {"name": "clap", "path": str(folder), "frequency": "concat"}).eval()
    config = encoder.standalone_config()
    options = {"name": "clap"} | json.loads(json.dumps(config.model_dump(mode="json")))
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_a_saved_extractor_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, tiny())
    ClapFeatureExtractor(max_length_s=1, frequency_max=10_000).save_pretrained(tmp_path)
    encoder = Clap(Clap.Config(path=str(tmp_path))).eval()
    assert encoder.encode([clip(10 * RATE)]).lengths == (64,)
    assert_close(encoder.frontend(clip(900))[:1001], reference(tmp_path, clip(900))[0], atol=1e-5, rtol=0)


def test_every_parameter_but_the_fusion_of_crops_gets_a_gradient() -> None:
    encoder = Clap(Clap.Config(architecture=tiny(enable_fusion=True).to_dict())).eval()
    features = encoder.encode([clip(500_000), clip(500)])
    features.x_BAE[features.mask_BA].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        fusion = "fusion_model" in name or "mel_conv2d" in name
        assert (parameter.grad is not None) == (not fusion), name


def test_bfloat16() -> None:
    encoder = Clap(Clap.Config(architecture=tiny(enable_fusion=True).to_dict())).to(torch.bfloat16).eval()
    features = encoder.encode([clip(8_000), clip(100_000)])
    assert features.x_BAE.dtype == torch.bfloat16
    assert features.lengths == (2, 14)
    assert features.x_BAE.isfinite().all()


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as raised:
        build("encoder", {"name": "clap", "path": str(path)})
    assert "\n" not in str(raised.value)


def test_what_is_no_clap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'path'"):
        build("encoder", "clap")
    with pytest.raises(ConfigError, match="frequency"):
        build("encoder", {"name": "clap", "frequency": "mean"})
    refused(tmp_path, "found: none")
    (tmp_path / "config.json").write_text('{"model_type": "clap_text_model"}')
    refused(tmp_path, "found: clap_text_model")
    refused(tmp_path / "missing", "cannot be loaded")


def test_missing_weights_are_refused_but_what_is_computed_may_be_missing(tmp_path: Path) -> None:
    weights = saved(tmp_path, tiny()) / "model.safetensors"
    tensors = load_file(weights)
    learned = {k: v for k, v in tensors.items() if not k.endswith(("_index", "num_batches_tracked"))}
    assert len(learned) < len(tensors)
    save_file(learned, weights, metadata={"format": "pt"})
    ours = Clap(Clap.Config(path=str(tmp_path))).network.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor), name
    for name in ("audio_encoder.norm.weight", "audio_encoder.batch_norm.running_var"):
        rest = {k: v for k, v in learned.items() if k != name}
        save_file(rest, weights, metadata={"format": "pt"})
        refused(tmp_path, f"lacks 1 weights of the encoder, such as {name}")
    weights.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")  # pickle is never read
    refused(tmp_path, "cannot be loaded")
