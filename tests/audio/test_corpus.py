"""Every file of the corpus is decoded as an independent decoder decodes it, or refused for a reason that is true.

`PAL_CORPUS=1` runs every command of the corpus and the other decoders' programs, as `python -m tests.audio.corpus` does;
without it every twelfth, and the decoders of this process. The committed files are always there.
"""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from pal.audio import load
from tests.audio.corpus import wild
from tests.audio.corpus.compare import DIFFERENT, EQUAL, REFUSED, UNREAD, Verdict, distance, judge
from tests.audio.corpus.generate import generate, sound
from tests.audio.corpus.refusals import is_expected, on_purpose
from tests.audio.fuzz import FILES

FULL = "PAL_CORPUS" in os.environ
AV_IS_WRONG = "ffmpeg_*_16000.webm"
"""FFmpeg 8's libraries leave samples before the sound of Opus in webm where its rate before encoding was not 48 kHz."""
pytest.importorskip("av")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    folder = tmp_path_factory.mktemp("corpus")
    committed = sorted(FILES.iterdir())
    made = generate(folder, seconds=0.3 if FULL else 0.1, every=1 if FULL else 12)
    paths = [path for path in [*committed, *made] if FULL or not fnmatch(path.name, AV_IS_WRONG)]
    return [judge(path, programs=FULL) for path in paths]


def test_the_corpus_is_there(verdicts: list[Verdict]) -> None:
    assert len(verdicts) > 450
    assert len({verdict.path.suffix for verdict in verdicts}) > 25
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 120_000


def test_nothing_is_silently_different_and_nothing_raises(verdicts: list[Verdict]) -> None:
    wrong = [f"{v.kind} {v.path.name}: {v.line}" for v in verdicts if v.kind not in (EQUAL, REFUSED, UNREAD)]
    assert not wrong, "\n".join(wrong)


def test_each_refusal_is_a_known_one_with_a_remedy(verdicts: list[Verdict]) -> None:
    refused = [verdict for verdict in verdicts if verdict.kind == REFUSED]
    wrong = [f"{v.path.name}: {v.line}" for v in refused if not is_expected(v.path.name, v.line) or "; " not in v.line]
    assert not wrong, "\n".join(wrong)


def test_few_files_that_two_decoders_read_are_refused(verdicts: list[Verdict]) -> None:
    whole = [v for v in verdicts if v.whole >= 2 and not on_purpose(v.path.name, v.line)]
    refused = [v.path.name for v in whole if v.kind == REFUSED]
    assert len(whole) > 300
    assert len(refused) <= 0.03 * len(whole), refused


def test_what_no_other_decoder_reads_is_known(verdicts: list[Verdict]) -> None:
    # DWVW is libsndfile's alone; an odd chunk without its pad byte before the sound makes other decoders give up
    known = ("soundfile_AIFF_DWVW_*", "wild_odd_chunk_no_pad_*", "wild_odd_no_pad_soundfile_AIFF_*")
    unread = [v.path.name for v in verdicts if v.kind == UNREAD]
    assert [name for name in unread if not any(fnmatch(name, pattern) for pattern in known)] == []


@pytest.mark.parametrize("name", ["stream_00_16000.wav", "soxstream_00_16000.aiff", "stream_00_16000.au"])
def test_files_without_a_length_are_read_to_the_end(name: str) -> None:
    path = FILES / name
    assert judge(path, programs=False).kind == REFUSED
    assert judge(path, read_to_end=True, programs=False).kind == EQUAL
    assert "gives no length" in str(load(path, 16_000, read_to_end=True).note)


def test_opus_in_webm_begins_with_the_sound() -> None:
    wave = load(FILES / "ffmpeg_00_16000.webm", 16_000)
    assert len(wave.samples_N) == 1600
    assert np.corrcoef(wave.samples_N.numpy(), sound(16_000, 1, 0.1)[:, 0])[0, 1] > 0.95


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    one, other = np.sin(np.arange(1000)), np.sin(np.arange(1000) + 0.01)
    assert distance(one, other, "pcm_s16le") > 1e-3
    assert distance(one, one[:-1], "pcm_s16le") == float("inf")
    assert distance(one, one[529:], "mp3") == 0
    assert distance(one, one * np.nan, "pcm_s16le") == float("inf")


def test_a_decoder_that_is_wrong_is_found_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.au"
    shutil.copy(FILES / "sox_01_16000.au", path)
    monkeypatch.setattr(
        "tests.audio.corpus.compare.load", lambda *_, **__: load((-sound(16_000, 1, 0.1), 16_000), 16_000)
    )
    assert judge(path, programs=False).kind == DIFFERENT


def test_wild_files_are_what_they_are_called() -> None:
    for name, data in wild.wav((b"RIFF" + bytes(8)).ljust(12, b"W") + b"fmt " + bytes(20) + b"data" + bytes(104)):
        assert data[:4] == b"RIFF", name
