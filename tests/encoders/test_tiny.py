"""The encoder `tiny`: its front-end against numpy, padding, time scale and order."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from pal.encoders import tiny
from pal.registry import build
from tests.models import noise

SMALL = {"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 2}


def made(**options):
    torch.manual_seed(0)
    encoder = build("encoder", {**SMALL, **options})
    # Statistics that do something, as after training.
    encoder.train()
    encoder.encode([noise(1.0, seed=s) for s in range(3)])
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return made()


@pytest.fixture(scope="module")
def causal():
    return made(causal=True)


@pytest.fixture(scope="module", params=["encoder", "causal"])
def either(request):
    return request.getfixturevalue(request.param)


def test_frontend_is_a_log_mel_spectrogram(encoder):
    samples_N = noise(0.3, seed=4)
    x = np.pad(samples_N.numpy().astype(np.float64), (256 - 80, 512))
    window = np.pad(np.hanning(401)[:400], 56)
    frames = np.stack([x[160 * f : 160 * f + 512] * window for f in range(30)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2 / (400 * 0.375)
    filters = mel_filter_bank(257, 64, 40.0, 8000.0, 16_000, norm=None, mel_scale="slaney")
    expected = (np.log10(np.maximum(power @ filters, 1e-8)) + 4) / 4
    np.testing.assert_allclose(encoder.frontend(samples_N).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 639, 640, 641, 16_000])
def test_every_sample_is_covered(either, samples):
    encoder = either
    features = encoder.encode([torch.ones(samples)])
    assert features.lengths == (-(-samples // 640),)
    assert features.lengths[0] * features.seconds_per_token >= samples / 16_000


def test_twenty_five_tokens_a_second(encoder):
    assert encoder.encode([noise(4.0)]).x_BAE.shape == (1, 100, 12)
    assert encoder.seconds_per_token == 1 / 25


def test_padded_batch_equals_single_clips(either):
    encoder = either
    clips = [noise(seconds, seed=i) for i, seconds in enumerate((0.4, 1.7, 0.93, 2.2))]
    together = encoder.encode(clips)
    for i, clip in enumerate(clips):
        alone = encoder.encode([clip])
        torch.testing.assert_close(together.x_BAE[i, : alone.lengths[0]], alone.x_BAE[0], atol=1e-5, rtol=0)
        assert together.lengths[i] == alone.lengths[0]
        assert not together.x_BAE[i, alone.lengths[0] :].any()


def test_an_event_moves_the_tokens_of_its_time(encoder):
    quiet = noise(4.0) * 1e-3
    loud = quiet.clone()
    loud[32_000:36_000] += noise(0.25, seed=9)
    change_A = (encoder.encode([loud]).x_BAE - encoder.encode([quiet]).x_BAE).abs().amax(-1)[0]
    assert 50 <= int(change_A.argmax()) <= 57
    # Two blocks of 15 tokens and the convolutions before them hear at most 20 tokens to either side.
    assert not change_A[:30].any()
    assert not change_A[80:].any()


def test_no_token_depends_on_what_comes_later(causal, encoder):
    """Up to the last sample of a token; and every sample that it may depend on is heard."""
    whole = noise(3.0, seed=5)
    tokens_AE = causal.encode([whole]).x_BAE[0]
    for end in (1, 2, 7, 40, 74):
        torch.testing.assert_close(causal.encode([whole[: 640 * end]]).x_BAE[0], tokens_AE[:end], atol=1e-5, rtol=0)
    changed = whole.clone()
    changed[640 * 40 - 1] += 0.5
    change_A = (causal.encode([changed]).x_BAE[0] - tokens_AE).abs().amax(-1)
    assert not change_A[:39].any() and change_A[39] > 0
    assert not change_A[40 + round(causal.reach_seconds / causal.seconds_per_token) :].any()
    cut = encoder.encode([whole[:25_600]]).x_BAE[0]
    assert not torch.allclose(cut[-1], encoder.encode([whole]).x_BAE[0, 39], atol=1e-3)  # as others do


def test_silence_is_finite(encoder):
    assert torch.isfinite(encoder.encode([torch.zeros(8_000)]).x_BAE).all()


def test_bands_are_hidden_in_training_only(encoder):
    frames_WFM = torch.ones(64, 5, 40)
    hidden_WFM = tiny.hide_bands(frames_WFM, 6)
    assert set(hidden_WFM.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hidden_WFM, hidden_WFM[:, :1].expand_as(hidden_WFM)), "a band is hidden in all frames alike"
    bins_W = (hidden_WFM[:, 0] == 0).sum(1)
    assert 0 < bins_W.float().mean() <= 12
    assert int(bins_W.max()) <= 12
    assert len(bins_W.unique()) > 3
    again = encoder.encode([noise(0.5)]).x_BAE
    torch.testing.assert_close(encoder.encode([noise(0.5)]).x_BAE, again, atol=0, rtol=0)
