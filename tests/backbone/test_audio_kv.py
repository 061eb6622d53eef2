"""Indexed clips: saved, refused, joined, cut, quantised."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pal.backbone.audio_kv import AudioKV
from pal.errors import BundleError, PalError
from pal.types import AUDIO, AudioFeatures, Tokens
from tests.identities.models import INTEGRATIONS, PLACEMENTS, conversation, features, shared

every_integration = pytest.mark.parametrize("name", INTEGRATIONS)


def indexed(name, *lengths, family="qwen3"):
    llm, integration = shared(family, name)
    return llm, integration, integration.index(features(*lengths), llm, "made-by")


def logits(llm, integration, audio, ids=PLACEMENTS["middle"], clips=(0,)):
    with torch.no_grad():
        return llm(integration(audio, [conversation(ids, clips)], llm)).logits


@every_integration
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    llm, integration, stored = indexed(name, 7, 4)
    for clip in (stored, stored[1], stored.quantized(), stored.to(dtype=torch.bfloat16)):
        clip.save(tmp_path / "clip.safetensors")
        again = AudioKV.load(tmp_path / "clip.safetensors", digest="made-by")
        assert (again.durations, again.digest) == (clip.durations, clip.digest)
        for ours, theirs in zip(again.streams, clip.streams, strict=True):
            assert (ours.lengths, ours.layers, ours.layout) == (theirs.lengths, theirs.layers, theirs.layout)
        assert torch.equal(logits(llm, integration, again), logits(llm, integration, clip))


def test_another_models_index_is_refused(tmp_path):
    _, _, stored = indexed("lal", 5)
    stored.save(tmp_path / "clip.safetensors")
    with pytest.raises(BundleError, match="another model"):
        AudioKV.load(tmp_path / "clip.safetensors", digest="other")


def test_every_flipped_byte_is_refused(tmp_path):
    _, _, stored = indexed("pal", 2)
    path = tmp_path / "clip.safetensors"
    stored.save(path)
    good = path.read_bytes()
    for place in [*range(0, len(good), 97), len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(BundleError):
            AudioKV.load(path)
    path.write_bytes(good[:-4])
    with pytest.raises(BundleError, match=r"clip\.safetensors"):
        AudioKV.load(path)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BundleError, match="not an audio index"):
        AudioKV.load(tmp_path / "other.safetensors")
    with pytest.raises(BundleError, match="not an audio index"):
        AudioKV.load(tmp_path / "missing.safetensors")


def test_the_file_holds_tensors_and_no_more(tmp_path):
    _, _, stored = indexed("lal", 5)
    stored.save(tmp_path / "clip.safetensors")
    assert set(load_file(tmp_path / "clip.safetensors")) == {"0.k_LBGAC", "0.v_LBGAC", "0.rows_BSD"}


@every_integration
def test_concat_of_clips_of_different_lengths(name):
    llm, integration, stored = indexed(name, 7, 4, 11)
    again = AudioKV.concat([stored[2], stored[0], stored[1]])
    assert again.streams[0].lengths == (11, 7, 4)
    ids = PLACEMENTS["two"]
    ours = logits(llm, integration, again, ids, (1, 0))
    torch.testing.assert_close(ours, logits(llm, integration, stored, ids, (0, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in INTEGRATIONS if name not in ("lal_audio_query", "query_gated")])
def test_a_slice_equals_the_audio_it_was_cut_from(name):
    # no token's features depend on its neighbours here
    llm, integration, stored = indexed(name, 12)
    audio = features(12)
    for start, end, first, last in ((0.0, 0.24, 0, 6), (0.12, 0.36, 3, 9), (0.24, 9.0, 6, 12)):
        cut = stored.slice(start, end)
        part = AudioFeatures(audio.x_BAE[:, first:last], (last - first,), 0.04)
        assert cut.streams[0].lengths == (last - first,)
        assert cut.seconds == pytest.approx((last - first) * 0.04)
        ours, theirs = logits(llm, integration, cut), logits(llm, integration, part)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seconds", [0.01, 0.02, 0.04, 0.08, 0.19])
def test_a_slice_at_the_border_of_two_tokens_takes_neither_more_nor_less(seconds):
    """Decimals are no multiples of one another in binary: 1.16 / 0.04 is less than 29, 0.28 / 0.04 more than 7."""
    _, _, stored = indexed("lal", 2)
    stream = replace(stored.streams[0], layout=replace(stored.streams[0].layout, seconds_per_token=seconds))
    for first in range(150):
        start, end = (round(seconds * number, 2) for number in (first, first + 3))
        assert stream.groups_between(start, end) == (first, first + 3)
        assert stream.groups_between(start + 0.3 * seconds, end - 0.3 * seconds) == (first, first + 3)
        assert stream.groups_between(start - 0.3 * seconds if first else start, end + 0.3 * seconds) == (
            max(0, first - 1),
            first + 4,
        )


def test_a_slice_of_the_hybrid_is_widened_to_whole_groups():
    _, _, stored = indexed("pal", 11)
    assert stored.slice(0.05, 0.2).streams[0].lengths == (6,)
    assert stored.slice(0.25, 5.0).streams[0].lengths == (5,)
    assert stored.slice(0.25, 5.0).streams[0].rows_BSD.shape[1] == 2


@pytest.mark.parametrize(
    "start, end", [(0.2, 0.1), (-1.0, 0.2), (0.2, 0.2), (5.0, 6.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)]
)
def test_slices_that_are_empty_are_refused(start, end):
    _, _, stored = indexed("lal", 11)
    with pytest.raises(PalError, match="cannot take"):
        stored.slice(start, end)


def test_joining_refuses_what_does_not_fit():
    _, _, lal = indexed("lal", 6)
    _, _, two = indexed("lal", 6, 6)
    _, _, other = indexed("lal_first", 6)
    _, _, pal = indexed("pal", 7)
    with pytest.raises(PalError, match="2 clips"):
        lal.append(two)
    with pytest.raises(PalError, match="layers"):
        lal.append(other)
    with pytest.raises(PalError, match=r"multiple of 0\.12 s"):
        pal.append(pal)
    with pytest.raises(PalError, match="int8"):
        AudioKV.concat([lal, lal.quantized()])
    with pytest.raises(BundleError, match="another model"):
        lal.append(replace(lal, digest="x"))
    for parts in ([lal, replace(lal, digest="x")], [lal, lal, replace(lal, digest="x")]):
        with pytest.raises(BundleError, match="the other clip was made by another model"):
            AudioKV.concat(parts)


@every_integration
def test_int8_is_small_and_near(name):
    llm, integration, stored = indexed(name, 7, 4)
    small = stored.quantized()
    (exact_stream,), (small_stream,) = stored.streams, small.streams
    if exact_stream.layers:
        assert small_stream.k_LBGAC.dtype == torch.int8
        assert small_stream.k_LBGAC.nbytes * 4 == exact_stream.k_LBGAC.nbytes
        for layer in exact_stream.layers:
            for ours, theirs in zip(small_stream.keys_values(layer), exact_stream.keys_values(layer), strict=True):
                # half a step of the largest number of each head and token, which has 127
                assert ((ours - theirs).abs() <= theirs.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    again = small.quantized().streams[0]
    assert all(torch.equal(x, small_stream.tensors()[name]) for name, x in again.tensors().items())
    joined = AudioKV.concat([small[0], small[1]])
    torch.testing.assert_close(logits(llm, integration, joined), logits(llm, integration, small))
    near = logits(llm, integration, small)
    exact = logits(llm, integration, stored)
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()


def test_dtype_and_size():
    _, _, stored = indexed("lal", 7)
    assert stored.nbytes == 2 * 3 * 2 * 7 * 8 * 4
    (half,) = stored.quantized().to("cpu", torch.bfloat16).streams
    assert half.k_LBGAC.dtype == torch.int8
    assert half.k_scale_LBGA.dtype == torch.float32
    assert half.keys_values(0)[0].dtype == torch.bfloat16
    assert (stored.tokens, stored.seconds, len(stored)) == (7, pytest.approx(0.28), 1)


@every_integration
def test_many_questions_of_one_indexed_clip_in_one_batch(name):
    llm, integration, stored = indexed(name, 7)
    rows = [Tokens([5, AUDIO, 6 + i, 9], [0]) for i in range(4)]
    with torch.no_grad():
        together = llm(integration(stored, rows, llm)).logits
        for at, row in enumerate(rows):
            torch.testing.assert_close(
                together[at], llm(integration(stored, [row], llm)).logits[0], atol=1e-5, rtol=1e-5
            )
