"""AF-Whisper, against transformers' own extractor and encoder."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3Encoder,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    WhisperFeatureExtractor,
)

from pal.encoders.af_whisper import AFWhisper
from pal.errors import ConfigError
from pal.registry import build

RATE = 16_000
SECOND = {"max_source_positions": 50}
"""A network whose window is one second."""


def tiny(**fields: int) -> AudioFlamingo3EncoderConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AudioFlamingo3EncoderConfig(**sizes | fields)


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)  # large enough that a frame out of place shows


def saved(folder: Path, config: AudioFlamingo3EncoderConfig) -> Path:
    model = AudioFlamingo3Encoder(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def saved_whole(folder: Path, config: AudioFlamingo3EncoderConfig) -> AudioFlamingo3ForConditionalGeneration:
    """With its LLM, in several files."""
    llm = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    llm |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    whole = AudioFlamingo3ForConditionalGeneration(AudioFlamingo3Config(audio_config=config.to_dict(), text_config=llm))
    randomize(whole)
    whole.save_pretrained(folder, max_shard_size="6KB")
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("af_whisper"), tiny())


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("second"), tiny(**SECOND))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> AFWhisper:
    return build("encoder", {"name": "af_whisper", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, length).astype(np.float32))


@cache
def network(folder: Path) -> AudioFlamingo3Encoder:
    return AudioFlamingo3Encoder.from_pretrained(folder).eval()


def reference(folder: Path, samples_N: Tensor, seconds: int = 30) -> tuple[Tensor, Tensor, int]:
    """Frames [F, M] and tokens [A, E] of transformers for one window, and how many frames are real."""
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=seconds)
    features = extractor(samples_N.numpy(), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    mask = features.attention_mask
    frames = int(mask.sum())
    with torch.no_grad():
        tokens_AE = network(folder)(features.input_features, input_features_mask=mask).last_hidden_state[0]
    return features.input_features[0].T[:frames], tokens_AE[: -(-frames // 4)], frames


# 5000 ms are 500 frames and 125 tokens; 282 samples are two frames, the second of which has a few
LENGTHS = [1, 160, 161, 282, 480, 640, 641, 80_000, 80_001, 479_681, 480_000]


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_and_tokens_equal_transformers(folder: Path, encoder: AFWhisper, length: int) -> None:
    samples_N = clip(length)
    frames_FM, tokens_AE, frames = reference(folder, samples_N)
    assert_close(encoder.frontend(samples_N)[:frames], frames_FM, atol=1e-5, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    assert features.lengths == (-(-length // 640),)  # 40 ms, rounded up
    assert_close(features.x_BAE[0], tokens_AE, atol=1e-5, rtol=1e-5)


def test_sizes(encoder: AFWhisper) -> None:
    assert (encoder.sampling_rate, encoder.window_seconds, encoder.seconds_per_token) == (RATE, 30.0, 0.04)
    assert encoder.width == 16
    assert encoder.frontend(clip(700)).shape[1] == 128


def test_tokens_are_all_that_transformers_keeps_and_a_started_one_more(second: Path) -> None:
    encoder = AFWhisper(AFWhisper.Config(path=str(second))).eval()
    real_W = torch.arange(1, 101)
    conv_W, kept_W = encoder.network._get_feat_extract_output_lengths(real_W)
    with torch.no_grad():
        tokens = encoder(torch.zeros(100, 103, 128), range(4, 104)).lengths
    assert list(tokens) == (kept_W + conv_W % 2).tolist()


def test_what_follows_the_clip_is_not_attended_to(second: Path) -> None:
    # the same real frames amid another silence: only tokens that the convolutions carry it to may move
    encoder = AFWhisper(AFWhisper.Config(path=str(second))).eval()
    frames_FM = encoder.frontend(clip(8_000))
    other_FM = frames_FM.clone()
    other_FM[52:] += 1.0  # the last row fills the window; frames 50 and 51 hear the end of the clip
    lengths = [53, 53]
    with torch.no_grad():
        one, two = encoder(torch.stack([frames_FM, other_FM]), lengths).x_BAE
    assert len(one) == 13
    assert_close(one[:12], two[:12], atol=1e-6, rtol=0)


def test_a_padded_batch_equals_its_clips(second: Path) -> None:
    encoder = AFWhisper(AFWhisper.Config(path=str(second))).eval()
    kinds = [(16_000, 1e-3), (9_001, 1.0), (50, 0.1), (40_000, 0.1), (1, 0.5)]
    clips = [clip(length, seed, level) for seed, (length, level) in enumerate(kinds)]
    with torch.no_grad():
        features = encoder.encode(clips)
    for row, samples_N in enumerate(clips):
        expected = torch.cat([reference(second, window_N, 1)[1] for window_N in samples_N.split(RATE)])
        assert features.lengths[row] == len(expected)
        assert features.mask_BA[row, : len(expected)].all()
        assert_close(features.x_BAE[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_seventy_seconds_are_three_windows(folder: Path, encoder: AFWhisper) -> None:
    samples_N = clip(70 * RATE)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(RATE)])
    assert features.lengths == (1750, 25)
    expected = torch.cat([reference(folder, window_N)[1] for window_N in samples_N.split(30 * RATE)])
    assert_close(features.x_BAE[0], expected, atol=1e-5, rtol=1e-5)


def test_an_event_stands_at_its_time(second: Path) -> None:
    encoder = AFWhisper(AFWhisper.Config(architecture=tiny(**SECOND).to_dict())).eval()
    quiet = clip(16_000, level=1e-3)
    with torch.no_grad():
        silent_AE = encoder.encode([quiet]).x_BAE[0]
        for token in (1, 9, 23):
            loud = quiet.clone()
            loud[token * 640 + 160 : token * 640 + 480] = clip(320, seed=1, level=0.01)
            change_A = (encoder.encode([loud]).x_BAE[0] - silent_AE).norm(dim=1)
            assert change_A.argmax() == token


@pytest.mark.parametrize("prefix", ["audio_tower.", "model.audio_tower."])
def test_the_whole_model_gives_its_audio_tower(tmp_path: Path, prefix: str) -> None:
    whole = saved_whole(tmp_path, tiny(**SECOND))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    # every other name of the tower, and a language model whose files are not even there
    renamed = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        tower = {prefix + k.split("audio_tower.")[1]: v for k, v in tensors.items() if "audio_tower." in k}
        (tmp_path / shard).unlink()
        if tower:
            save_file(tower, tmp_path / shard, metadata={"format": "pt"})
        renamed |= dict.fromkeys(tower, shard)
        renamed |= {name: shard if tower else "gone.safetensors" for name in tensors if "audio_tower." not in name}
    assert "gone.safetensors" in renamed.values()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": renamed}))
    ours = AFWhisper(AFWhisper.Config(path=str(tmp_path)))
    theirs = whole.model.audio_tower.state_dict()
    assert ours.network.state_dict().keys() == theirs.keys()
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert ours.window_seconds == 1.0


def test_half_precision_on_disk_is_read_in_float32(tmp_path: Path) -> None:
    model = AudioFlamingo3Encoder(tiny(**SECOND)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    network = AFWhisper(AFWhisper.Config(path=str(tmp_path))).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.conv1.weight, model.conv1.weight.float())


def test_the_names_of_whispers_configuration_are_understood(tmp_path: Path) -> None:
    saved(tmp_path, tiny(**SECOND))
    fields = json.loads((tmp_path / "config.json").read_text())
    old = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers", "intermediate_size": "encoder_ffn_dim"}
    for new, name in (old | {"num_attention_heads": "encoder_attention_heads"}).items():
        fields[name] = fields.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert AFWhisper(AFWhisper.Config(path=str(tmp_path))).width == 16


def test_a_bundle_rebuilds_it_without_the_folder(second: Path) -> None:
    encoder = build("encoder", {"name": "af_whisper", "path": str(second)}).eval()
    config = encoder.standalone_config()
    options = {"name": "af_whisper"} | json.loads(json.dumps(config.model_dump(mode="json")))
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_a_saved_extractor_that_cuts_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, tiny(**SECOND))
    WhisperFeatureExtractor(feature_size=80, chunk_length=1, max_length=7).save_pretrained(tmp_path)
    encoder = AFWhisper(AFWhisper.Config(path=str(tmp_path)))
    assert encoder.encode([clip(16_000)]).lengths == (25,)
    assert encoder.frontend(clip(1_600)).shape[1] == 128


def test_every_parameter_but_the_fixed_positions_gets_a_gradient() -> None:
    encoder = AFWhisper(AFWhisper.Config(architecture=tiny(**SECOND).to_dict()))
    features = encoder.encode([clip(20_000), clip(500)])
    features.x_BAE[features.mask_BA].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad or "embed_positions" in name


def test_bfloat16() -> None:
    encoder = AFWhisper(AFWhisper.Config(architecture=tiny(**SECOND).to_dict())).to(torch.bfloat16)
    features = encoder.encode([clip(8_000), clip(16_000)])
    assert features.x_BAE.dtype == torch.bfloat16
    assert features.x_BAE.isfinite().all()


def test_what_is_no_af_whisper_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as raised:
            build("encoder", {"name": "af_whisper", "path": str(path)})
        assert "\n" not in str(raised.value)

    with pytest.raises(ConfigError, match="missing key 'path'"):
        build("encoder", "af_whisper")
    refused(tmp_path, "found: none")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    refused(tmp_path, "found: whisper")
    refused(tmp_path / "missing", "cannot be loaded")


def test_missing_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match) as raised:
            build("encoder", {"name": "af_whisper", "path": str(tmp_path)})
        assert "\n" not in str(raised.value)

    weights = saved(tmp_path, tiny(**SECOND)) / "model.safetensors"
    tensors = load_file(weights)
    fc1 = tensors.pop("layers.1.fc1.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(r"lacks 1 weights of the encoder, such as layers\.1\.fc1\.weight")
    save_file(tensors | {"layers.1.fc1.weight": fc1[:8].clone()}, weights, metadata={"format": "pt"})
    refused(r"has 'layers\.1\.fc1\.weight' in another shape")
    weights.write_bytes(b"not a tensor")
    refused("cannot be loaded")
    weights.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")  # pickle is never read
    refused("cannot be loaded")
    weights = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    refused("cannot be loaded")
    for damaged in ("{", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        refused("cannot be loaded")
