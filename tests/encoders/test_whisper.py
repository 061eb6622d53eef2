"""Whisper, against transformers' own extractor and model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from pal.encoders.whisper import Whisper
from pal.errors import ConfigError
from pal.registry import build

RATE = 16_000


def tiny(**fields: int) -> WhisperConfig:
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperConfig(**sizes | tokens | fields)


def saved(folder: Path, config: WhisperConfig, kind: type = WhisperModel) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            parameter.data.normal_(0, 0.3)  # large enough that a frame out of place shows
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whisper"), tiny())


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Whisper:
    return build("encoder", {"name": "whisper", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, length).astype(np.float32))


def reference(folder: Path, samples_N: Tensor) -> tuple[Tensor, Tensor, int]:
    """Frames [F, M] and tokens [A, E] of transformers for one window, and how many frames are real."""
    extractor = WhisperFeatureExtractor(feature_size=80)
    features = extractor(samples_N.numpy(), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    frames = int(features.attention_mask.sum())
    model = WhisperModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens_AE = model.encoder(features.input_features).last_hidden_state[0]
    return features.input_features[0].T[:frames], tokens_AE[: (frames - 1) // 2 + 1], frames


LENGTHS = [1, 159, 160, 161, 282, 320, 16_000, 33_333, 479_000, 479_681, 479_999, 480_000]


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_and_tokens_equal_transformers(folder: Path, encoder: Whisper, length: int) -> None:
    samples_N = clip(length)
    frames_FM, tokens_AE, frames = reference(folder, samples_N)
    assert_close(encoder.frontend(samples_N)[:frames], frames_FM, atol=1e-5, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    assert features.lengths == (len(tokens_AE),)
    assert_close(features.x_BAE[0], tokens_AE, atol=1e-5, rtol=1e-5)


def test_a_click_at_the_very_end_reaches_the_silence_after_it(folder: Path, encoder: Whisper) -> None:
    # its loudest frame lies past the clip, and it sets the floor of all others
    samples_N = torch.zeros(16_000)
    samples_N[-1] = 1.0
    frames_FM, tokens_AE, frames = reference(folder, samples_N)
    assert_close(encoder.frontend(samples_N)[:frames], frames_FM, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert_close(encoder.encode([samples_N]).x_BAE[0], tokens_AE, atol=1e-5, rtol=1e-5)


def test_a_padded_batch_equals_its_clips(folder: Path, encoder: Whisper) -> None:
    clips = [
        clip(length, seed, level) for seed, (length, level) in enumerate([(480_000, 1e-3), (9_001, 1.0), (50, 0.1)])
    ]
    with torch.no_grad():
        features = encoder.encode(clips)
    for row, samples_N in enumerate(clips):
        tokens_AE = reference(folder, samples_N)[1]
        assert_close(features.x_BAE[row][features.mask_BA[row]], tokens_AE, atol=1e-5, rtol=1e-5)


def test_seventy_seconds_are_three_windows(folder: Path, encoder: Whisper) -> None:
    samples_N = clip(70 * RATE)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(RATE)])
    assert features.lengths == (3500, 50)
    assert features.seconds_per_token == 0.02
    expected = torch.cat([reference(folder, window_N)[1] for window_N in samples_N.split(30 * RATE)])
    assert_close(features.x_BAE[0], expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_with_a_head_gives_the_same_weights(tmp_path: Path) -> None:
    config = tiny(max_source_positions=50)
    folder = saved(tmp_path, config, WhisperForConditionalGeneration)
    ours = Whisper(Whisper.Config(path=str(folder)))
    theirs = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.state_dict()
    assert ours.network.state_dict().keys() == theirs.keys()
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert (ours.window_seconds, ours.width, ours.sampling_rate) == (1.0, 16, RATE)
    assert ours.encode([clip(25 * RATE // 10)]).lengths == (125,)


def test_a_bundle_rebuilds_it_without_the_folder(folder: Path, encoder: Whisper) -> None:
    config = encoder.standalone_config()
    options = {"name": "whisper"} | config.model_dump(mode="json")
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_a_saved_extractor_that_cuts_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(max_source_positions=50))
    WhisperFeatureExtractor(feature_size=80, chunk_length=1, max_length=7).save_pretrained(folder)
    assert Whisper(Whisper.Config(path=str(folder))).encode([clip(16_000)]).lengths == (50,)


def test_more_mel_bins(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(max_source_positions=50, num_mel_bins=128))
    assert Whisper(Whisper.Config(path=str(folder))).frontend(clip(1_600)).shape[1] == 128


def test_every_parameter_but_the_fixed_positions_gets_a_gradient(tmp_path: Path) -> None:
    encoder = Whisper(Whisper.Config(architecture=tiny(max_source_positions=50).to_dict()))
    features = encoder.encode([clip(20_000), clip(500)])
    features.x_BAE[features.mask_BA].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad or "embed_positions" in name


def test_bfloat16(tmp_path: Path) -> None:
    encoder = Whisper(Whisper.Config(architecture=tiny(max_source_positions=50).to_dict())).to(torch.bfloat16)
    assert encoder.encode([clip(8_000)]).x_BAE.dtype == torch.bfloat16


def test_what_is_no_whisper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'path'"):
        build("encoder", "whisper")
    with pytest.raises(ConfigError, match="found: none"):
        build("encoder", {"name": "whisper", "path": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="found: llama"):
        build("encoder", {"name": "whisper", "path": str(tmp_path)})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build("encoder", {"name": "whisper", "path": str(tmp_path / "missing")})
    folder = saved(tmp_path / "w", tiny(max_source_positions=50))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "encoder" in name and "fc1.weight" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights of the encoder"):
        build("encoder", {"name": "whisper", "path": str(folder)})


@torch.no_grad()
def test_a_shorter_window_is_a_network_with_fewer_positions(folder: Path) -> None:
    """Against transformers' own encoder with 100 positions, on a clip of two windows; saved and built again, too."""
    encoder = build("encoder", {"name": "whisper", "path": str(folder), "window_seconds": 2.0}).eval()
    assert encoder.window_seconds == 2.0
    samples_N = clip(56_000)
    short = WhisperModel(tiny(max_source_positions=100)).eval()
    weights = load_file(folder / "model.safetensors")
    name = "encoder.embed_positions.weight"
    short.load_state_dict(weights | {name: weights[name][:100]})
    frames = WhisperFeatureExtractor(feature_size=80)(
        [samples_N[:32_000].numpy(), samples_N[32_000:].numpy()],
        sampling_rate=RATE,
        return_tensors="pt",
        padding="max_length",
        max_length=32_000,
    )
    expected_WAE = short.encoder(frames.input_features).last_hidden_state
    features = encoder.encode([samples_N])
    assert features.lengths == (175,)
    assert_close(features.x_BAE[0], torch.cat((expected_WAE[0], expected_WAE[1, :75])), atol=1e-5, rtol=1e-5)
    alone = build("encoder", {"name": "whisper", **encoder.standalone_config().model_dump()}).eval()
    alone.load_state_dict(encoder.state_dict())
    assert_close(alone.encode([samples_N]).x_BAE, features.x_BAE)


def test_a_window_cannot_be_longer_than_the_checkpoints(folder: Path) -> None:
    with pytest.raises(ConfigError, match="window_seconds is 31, but the checkpoint's window has 30 s"):
        build("encoder", {"name": "whisper", "path": str(folder), "window_seconds": 31.0})
