"""Ray's actors give the file that one process gives, and nothing of Ray stays."""

import sys
import tempfile
from pathlib import Path

import pytest

from pal import ray_session
from pal.batch import ray_workers, read_input, run
from pal.batch.parts import AnswerParts
from pal.errors import ConfigError
from tests.batch.conftest import QUESTIONS
from tests.counts import full_only


@pytest.mark.filterwarnings("ignore")
@full_only
@pytest.mark.torture
def test_two_workers_answer_as_one_and_leave_nothing(clips, model, tmp_path):
    model.save_pretrained(tmp_path / "bundle", full=True)
    given, before = read_input(clips, QUESTIONS), set(Path(tempfile.gettempdir()).glob("pal-ray-*"))
    run(given, tmp_path / "alone.jsonl", model, max_new_tokens=6)
    out, parts = tmp_path / "two.jsonl", 0

    def counting(reports, done, total):
        nonlocal parts
        for number, report in enumerate(reports, 1):
            parts = len(list(AnswerParts(out).folder.glob("part.*")))
            yield report
            if number == 2:
                raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run(given, out, str(tmp_path / "bundle"), max_new_tokens=6, workers=2, progress=counting)
    except ConfigError as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("this machine is so busy that Ray's processes need over 30 s to start, three times")
    assert 1 <= parts <= 2  # the model of a worker may be slow to load
    assert set(Path(tempfile.gettempdir()).glob("pal-ray-*")) == before
    # what the workers answered is taken up by another way to ask
    report = run(given, out, model, max_new_tokens=6)
    assert report.resumed >= 1
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"several workers need Ray; pip install 'pal-audio\[ray\]'"):
        ray_workers.check(None)


def test_a_cluster_is_used_only_where_it_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    with pytest.raises(ConfigError, match="--address ray://elsewhere:10001"):
        ray_workers.check(None)
    ray_workers.check("ray://elsewhere:10001")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    ray_workers.check(None)


def test_workers_share_the_gpus_that_are_there(monkeypatch):
    for devices, workers, expected in ((0, 2, 0.0), (1, 1, 1.0), (1, 4, 0.25), (4, 2, 1.0), (2, 3, 0.5), (8, 8, 1.0)):
        monkeypatch.setattr("torch.cuda.device_count", lambda devices=devices: devices)
        assert ray_session.shared_gpus(workers) == expected
