"""BEATs, against an independent implementation of its description, and its attention against transformers' WavLM."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from pal.encoders.beats import Beats, BeatsArchitecture, BeatsNetwork
from pal.errors import ConfigError
from pal.registry import build
from tests.encoders.published import BEATS, beats_tensors, save_beats

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_beats(tmp_path_factory.mktemp("beats"), beats_tensors())


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Beats:
    return build("encoder", {"name": "beats", "path": str(folder)}).eval()


def clip(length: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, length).astype(np.float32))


def sizes(**fields: object) -> BeatsArchitecture:
    known = {name: value for name, value in BEATS.items() if name in BeatsArchitecture.model_fields}
    return BeatsArchitecture(**known | fields)


def frames_of(samples_N: Tensor) -> Tensor:
    """Whole patches of frames [F, M] by transformers' functions: 16 bits, povey window, silence behind the clip."""
    frames = 16 * math.ceil(len(samples_N) / 2560)
    padded_N = np.zeros(160 * (frames - 1) + 400)
    padded_N[: len(samples_N)] = samples_N.numpy().astype(np.float64) * 32768
    filters_XM = mel_filter_bank(
        257, 128, 20, 8000, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    frames_MF = spectrogram(
        padded_N,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters_XM,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    )
    return (torch.from_numpy(frames_MF.T) - 15.41663) / (2 * 6.55582)


def norm(x_AE: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    centred_AE = x_AE - x_AE.mean(1, keepdim=True)
    scale_A1 = (centred_AE.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return centred_AE * scale_A1 * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x_AE: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x_AE @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def bucket(distance: int, buckets: int, far: int) -> int:
    """Of a key so many patches ahead: half of the buckets a side, half of those for one distance each."""
    side, single = buckets // 2, buckets // 4
    found = abs(distance)
    if found >= single:
        found = single + int(math.log(found / single) / math.log(far / single) * (side - single))
    return min(found, side - 1) + (side if distance > 0 else 0)


def reference(tensors: dict[str, Tensor], frames_FM: Tensor) -> Tensor:
    """The tokens [A, E] of one window; nothing is shared with the product."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    kernel_EX = tensors["patch_embedding.weight"].flatten(1)
    rows = []
    for step in range(len(frames_FM) // 16):
        for band in range(8):
            patch_FM = frames_FM.double()[16 * step : 16 * step + 16, 16 * band : 16 * band + 16]
            rows.append(kernel_EX @ patch_FM.flatten())
    x_AE = linear(norm(torch.stack(rows), tensors, "layer_norm"), tensors, "post_extract_proj")
    patches, width = x_AE.shape

    # positions: each group of channels hears `taps` patches around its own, half of them and its own behind it
    v_EXK, g_K = tensors["encoder.pos_conv.0.weight_v"], tensors["encoder.pos_conv.0.weight_g"].flatten()
    taps, inputs = v_EXK.shape[2], v_EXK.shape[1]
    convolved_AE = tensors["encoder.pos_conv.0.bias"].repeat(patches, 1)
    for tap in range(taps):
        tap_EX = v_EXK[:, :, tap] * g_K[tap] / v_EXK[:, :, tap].square().sum().sqrt()
        for at in range(patches):
            there = at + tap - taps // 2
            if 0 <= there < patches:
                for channel in range(width):
                    first = channel // inputs * inputs
                    convolved_AE[at, channel] += tap_EX[channel] @ x_AE[there, first : first + inputs]
    x_AE = norm(x_AE + gelu(convolved_AE), tensors, "encoder.layer_norm")

    heads = tensors["encoder.layers.0.self_attn.grep_a"].numel()
    table = tensors["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    bias_AKH = torch.stack(
        [torch.stack([table[bucket(k - a, len(table), 50)] for k in range(patches)]) for a in range(patches)]
    )
    layers = sum(name.endswith("fc1.weight") for name in tensors)
    alpha = (2 * layers) ** 0.25
    for at in range(layers):
        layer = f"encoder.layers.{at}"
        q_AE, k_AE, v_AE = (linear(x_AE, tensors, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        heard = []
        for head in range(heads):
            of = slice(head * (width // heads), (head + 1) * (width // heads))
            grep_A8 = linear(q_AE[:, of], tensors, f"{layer}.self_attn.grep_linear")
            update_A, reset_A = grep_A8[:, :4].sum(1).sigmoid(), grep_A8[:, 4:].sum(1).sigmoid()
            gate_A = update_A * (reset_A * tensors[f"{layer}.self_attn.grep_a"].flatten()[head] - 1) + 2
            scores_AK = q_AE[:, of] @ k_AE[:, of].T / math.sqrt(width // heads)
            heard.append((scores_AK + gate_A[:, None] * bias_AKH[:, :, head]).softmax(1) @ v_AE[:, of])
        heard_AE = linear(torch.cat(heard, 1), tensors, f"{layer}.self_attn.out_proj")
        x_AE = norm(alpha * x_AE + heard_AE, tensors, f"{layer}.self_attn_layer_norm")
        inner_AE = linear(gelu(linear(x_AE, tensors, f"{layer}.fc1")), tensors, f"{layer}.fc2")
        x_AE = norm(alpha * x_AE + inner_AE, tensors, f"{layer}.final_layer_norm")
    return x_AE.float()


@pytest.mark.parametrize("length", [1, 400, 2_560, 2_561, 16_000, 24_000])
def test_equals_the_description(encoder: Beats, length: int) -> None:
    samples_N = clip(length)
    frames_FM = frames_of(samples_N)
    assert_close(encoder.frontend(samples_N), frames_FM, atol=1e-4, rtol=0)
    with torch.no_grad():
        features = encoder.encode([samples_N])
    expected_AE = reference(beats_tensors(), frames_FM)
    assert features.lengths == (len(expected_AE),) == (8 * -(-length // 2560),)
    assert_close(features.x_BAE[0], expected_AE, atol=1e-4, rtol=1e-4)


def test_relative_positions_are_those_of_wavlm() -> None:
    with torch.device("meta"):
        empty = BeatsNetwork(BeatsArchitecture())
    ours = empty.encoder.layers[0].self_attn
    table = torch.randn(320, 12, generator=torch.Generator().manual_seed(0))
    ours = ours.to_empty(device="cpu")
    theirs = WavLMAttention(768, 12, num_buckets=320, max_distance=800)
    with torch.no_grad():
        ours.relative_attention_bias.weight.copy_(table)
        theirs.rel_attn_embed.weight.copy_(table)
        assert torch.equal(ours.bias(1_100), theirs.compute_bias(1_100, 1_100))


def test_attention_is_that_of_wavlm_where_the_query_is_the_input() -> None:
    torch.manual_seed(0)
    ours = BeatsNetwork(sizes()).encoder.layers[0].self_attn
    theirs = WavLMAttention(16, 2, num_buckets=20, max_distance=50)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.5)
    # WavLM's gate sees the layer's input; BEATs's sees the projected query
    theirs.q_proj.weight.data = torch.eye(16)
    theirs.q_proj.bias.data.zero_()
    names = {"gru_rel_pos_linear": "grep_linear", "rel_attn_embed": "relative_attention_bias"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        part = name.split(".")[0]
        state["grep_a" if part == "gru_rel_pos_const" else name.replace(part, names.get(part, part))] = tensor
    ours.load_state_dict(state)
    x_WAE = torch.randn(2, 70, 16)
    mask_WA = torch.arange(70) < torch.tensor([[70], [33]])
    with torch.no_grad():
        expected_WAE = theirs(x_WAE, attention_mask=mask_WA.long())[0]
        found_WAE = ours(x_WAE, ours.bias(70), mask_WA)
    assert_close(found_WAE, expected_WAE, atol=1e-5, rtol=1e-5)


def test_the_published_size() -> None:
    with torch.device("meta"):
        encoder = build("encoder", {"name": "beats", "architecture": {}})
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 90_311_792
    assert (encoder.width, encoder.seconds_per_token, encoder.window_seconds) == (768, 0.02, 10.24)


def test_a_step_is_eight_tokens_from_low_to_high(tmp_path: Path) -> None:
    # without layers and with silent positions a token knows nothing but its own patch
    cfg = BEATS | {"encoder_layers": 1}
    tensors = beats_tensors(cfg)
    tensors["encoder.pos_conv.0.weight_g"].zero_()
    for name in ("self_attn.out_proj", "fc2"):
        for kind in ("weight", "bias"):
            tensors[f"encoder.layers.0.{name}.{kind}"].zero_()
    encoder = build("encoder", {"name": "beats", "path": str(save_beats(tmp_path, tensors, encoder_layers=1))})
    quiet_FM = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for step, band in [(0, 0), (0, 6), (2, 0), (3, 7)]:
        event_FM = quiet_FM.clone()
        event_FM[16 * step + 3, 16 * band + 5] += 5
        with torch.no_grad():
            both = encoder(torch.stack([quiet_FM, event_FM]), [64, 64]).x_BAE
        changed = (both[0] - both[1]).abs().amax(1).nonzero().flatten().tolist()
        assert changed == [step * 8 + band]


def test_a_padded_batch_equals_its_clips(encoder: Beats) -> None:
    clips = [clip(length, seed, level) for seed, (length, level) in enumerate([(20_000, 1e-3), (9_001, 1.0), (1, 0.1)])]
    with torch.no_grad():
        features = encoder.encode(clips)
    assert features.lengths == (64, 32, 8)
    for row, samples_N in enumerate(clips):
        found_AE = features.x_BAE[row][features.mask_BA[row]]
        assert_close(found_AE, reference(beats_tensors(), frames_of(samples_N)), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert_close(found_AE, encoder.encode([samples_N]).x_BAE[0], atol=1e-5, rtol=1e-5)


def test_what_padding_holds_does_not_matter(encoder: Beats) -> None:
    frames_WFM = torch.randn(2, 48, 128, generator=torch.Generator().manual_seed(0))
    noisy_WFM = frames_WFM.clone()
    noisy_WFM[1, 16:] += 100
    with torch.no_grad():
        one, two = (encoder(x, [48, 16]) for x in (frames_WFM, noisy_WFM))
    assert torch.equal(one.x_BAE[one.mask_BA], two.x_BAE[two.mask_BA])


@pytest.mark.parametrize(("window", "counts"), [(0.32, (8 * 10, 8)), (10.24, (8 * 10, 8))])
def test_windows_lose_nothing(folder: Path, window: float, counts: tuple[int, ...]) -> None:
    encoder = build("encoder", {"name": "beats", "path": str(folder), "window_seconds": window}).eval()
    samples_N = clip(25_000)
    with torch.no_grad():
        features = encoder.encode([samples_N, clip(100)])
    assert features.lengths == counts
    assert features.lengths[0] * features.seconds_per_token >= 25_000 / RATE
    windows = samples_N.split(round(window * RATE))
    expected_AE = torch.cat([reference(beats_tensors(), frames_of(window_N)) for window_N in windows])
    assert_close(features.x_BAE[0], expected_AE, atol=1e-4, rtol=1e-4)


def test_the_last_sample_of_a_window_is_heard(encoder: Beats) -> None:
    samples_N = clip(2_560)
    click_N = samples_N.clone()
    click_N[-1] += 1
    with torch.no_grad():
        change = (encoder.encode([samples_N]).x_BAE - encoder.encode([click_N]).x_BAE).abs().max()
    assert change > 1e-2


def test_mean_over_frequencies(folder: Path, encoder: Beats) -> None:
    mean = build("encoder", {"name": "beats", "path": str(folder), "frequency": "mean"}).eval()
    clips = [clip(20_000), clip(3_000)]
    with torch.no_grad():
        each, means = encoder.encode(clips), mean.encode(clips)
    assert (means.lengths, means.seconds_per_token) == ((8, 2), 0.16)
    assert_close(means.x_BAE[0], each.x_BAE[0].unflatten(0, (-1, 8)).mean(1))


def test_a_bundle_rebuilds_it_without_the_folder(encoder: Beats) -> None:
    options = {"name": "beats"} | json.loads(json.dumps(encoder.standalone_config().model_dump(mode="json")))
    options["path"] = "nowhere/at-all"
    twin = build("encoder", options).eval()
    twin.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.encode([clip(4_000)]).x_BAE, encoder.encode([clip(4_000)]).x_BAE)


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    encoder = build("encoder", {"name": "beats", "path": str(folder)})
    features = encoder.encode([clip(20_000), clip(500)])
    features.x_BAE[features.mask_BA].pow(3).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_bfloat16() -> None:
    encoder = Beats(Beats.Config(architecture=sizes())).to(torch.bfloat16)
    assert encoder.encode([clip(8_000), clip(3)]).x_BAE.dtype == torch.bfloat16


def test_what_is_no_beats_is_refused(tmp_path: Path) -> None:
    def read(**fields: object) -> None:
        build("encoder", {"name": "beats", "path": str(tmp_path), **fields})

    with pytest.raises(ConfigError, match="missing key 'path'; make a folder with: pal convert"):
        build("encoder", "beats")
    with pytest.raises(ConfigError, match=r"has no config.json"):
        read()
    with pytest.raises(ConfigError, match=r"no multiple of the 0.16 s of a patch; give 9.92"):
        read(architecture=sizes(), window_seconds=10)
    for fields, message in [
        ({"encoder_layers": 4}, r"lacks 19 of .* weights, such as 'encoder.layers.3"),
        ({"encoder_layers": 2}, r"has 19 weights that .* no place for, such as 'encoder.layers.2"),
        ({"num_buckets": 40}, r"has shape \(20, 2\), its configuration asks for \(40, 2\)"),
        ({"conv_pos_groups": 3}, "encoder_embed_dim 16 is no multiple of conv_pos_groups"),
        ({"max_distance": 5}, "max_distance 5 is not above num_buckets / 4 = 5"),
        ({"layer_norm_first": True}, "'layer_norm_first' is True, and this encoder supports only False"),
        ({"gru_rel_pos": False}, "'gru_rel_pos' is False, and this encoder supports only True"),
        ({"activation_fn": "glu"}, "'activation_fn' is glu, and this encoder supports only gelu"),
    ]:
        save_beats(tmp_path, beats_tensors(), **fields)
        with pytest.raises(ConfigError, match=message):
            read()
    tensors = beats_tensors()
    tensors["encoder.layers.1.self_attn.relative_attention_bias.weight"] = torch.zeros(20, 2)
    save_beats(tmp_path, tensors)
    with pytest.raises(ConfigError, match="different relative position biases"):
        read()
