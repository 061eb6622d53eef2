"""What the page of folders of every kind says (`conftest.py` makes them)."""

import base64
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from pal.app import cli
from pal.errors import ConfigError
from pal.evaluate.compare import compare
from pal.report.embed import MediaEmbedder
from pal.report.join import labels, make
from tests.html_page import Page
from tests.report.conftest import BENCH, EVIL


@pytest.fixture(scope="module")
def source(made):
    return Path(made.out).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


@pytest.fixture
def small_plots(monkeypatch):
    """A tenth of the pixels in each direction, where nothing is asked of the plots that the page draws."""
    monkeypatch.setattr("pal.plots.DPI", 11)


def cells(page, first, columns):
    return next(row for row in page.rows if row[0] == first and len(row) == columns)


def sounds(page):
    return [at["src"] for tag, at in page.attributes if tag == "audio"]


def data(uri):
    return base64.b64decode(uri.partition(",")[2])


def test_everything_is_there(made, page):
    assert made.faults == [] and made.left_out == []
    assert [(one["kind"], one["name"]) for one in made.found] == [
        ("Training", "lal"),
        ("Training", "plits"),
        ("Scores", "runs"),
        ("Scores", "runs/lal/eval"),
        ("Scores", "runs/plits/eval"),
        ("Cost", "bench"),
        ("Probes", "probe"),
    ]
    assert made.bytes == Path(made.out).stat().st_size
    # losses; overall, by task and by duration of the scenes; overall, by category and by duration of the benchmark
    made_here = 1 + 3 + 3
    assert page.tags.count("img") == made_here + 2
    assert all(at["alt"] for tag, at in page.attributes if tag == "img")
    assert all(at["aria-label"] for tag, at in page.attributes if tag == "audio")
    assert page.tags.count("table") == page.tags.count("caption")
    # 4 of the benchmark, one for each question about scenes, 2 of the probe
    asked = next(one["n"] for one in made.found if one["name"] == "runs")
    assert len(sounds(page)) == 4 + asked + 2


def test_it_stands_alone(source, page):
    links = [one for one in page.sources if not one.startswith("data:")]
    assert links and all(one.startswith("#") and one[1:] in page.ids for one in links)
    assert len(page.ids) == len(set(page.ids))
    policy = next(at["content"] for tag, at in page.attributes if at.get("http-equiv"))
    script = source.partition("<script>")[2].partition("</script>")[0]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "url(" not in source and "@import" not in source


def test_text_is_escaped(source, page):
    assert source.count("<script") == 1
    assert "<b>" not in source
    assert EVIL in page.text
    assert "Most of it looks at <b>the dog</b>." in page.text
    assert "<title>A &amp; &#34;B&#34;</title>" in source


def test_training(root, page):
    report = json.loads((root / "runs/plits/train.json").read_text())
    row = cells(page, "plits, join", 8)
    assert row[2:4] == ["2", f"{report['stages'][1]['loss']:.3f}"]
    assert cells(page, "run", 2) == ["run", "model.integration.name"]
    assert cells(page, "lal", 2)[1] == "lal" and cells(page, "plits", 2)[1] == "plits"


def test_scores_and_the_comparison(root, page):
    folders = [root / "runs" / name / "eval" for name in ("lal", "plits")]
    for folder in folders:
        found = json.loads((folder / "score.json").read_text())
        row = cells(page, f"runs/{folder.parent.name}/eval", 8)
        assert row[1:4] == [
            f"{found['score']:.3f}",
            " to ".join(f"{e:.3f}" for e in found["ci95"]),
            f"{found['no_audio_score']:.3f}",
        ]
        assert row[4] == f"{found['gain']:.3f}"
    second = compare(folders).rows[1]
    row = cells(page, "runs/plits/eval", 7)
    assert row[1] == f"{second.difference:.3f}"
    assert row[3:] == [
        f"{second.p_bootstrap:.2g}",
        f"{second.only_first}",
        f"{second.only_this}",
        f"{second.p_mcnemar:.2g}",
    ]


def test_clips_are_whole(root, page):
    lengths = []
    for uri in sounds(page):
        info = soundfile.info(io.BytesIO(data(uri)))
        assert (info.channels, info.subtype, info.format) == (1, "PCM_16", "WAV") and info.samplerate <= 16_000
        lengths.append(info.frames / info.samplerate)
    for number in range(4):
        assert round(0.1 + 0.1 * number, 3) in [round(length, 3) for length in lengths]
    assert round(0.25, 3) in lengths  # the probe's second clip, at its own 8 kHz


def test_the_line_over_a_heat_map_is_where_the_seconds_are(root, page):
    (entry,) = json.loads((root / "probe/probe.json").read_text())["pictures"]
    (axis,) = entry["axes"]
    from matplotlib.image import imread

    rgb = imread(root / "probe/map.png")[..., :3]
    red = (rgb[..., 0] > 0.9) & (rgb[..., 1] < 0.1)
    columns, rows = np.flatnonzero(red.any(0)), np.flatnonzero(red.any(1))
    assert axis["left"] == pytest.approx(columns[0] / red.shape[1], abs=0.003)
    assert axis["right"] == pytest.approx((columns[-1] + 1) / red.shape[1], abs=0.003)
    assert axis["top"] == pytest.approx(rows[0] / red.shape[0], abs=0.003)
    assert axis["bottom"] == pytest.approx((rows[-1] + 1) / red.shape[0], abs=0.003)
    assert (axis["start"], axis["end"]) == (0.0, 0.5)
    (given,) = [json.loads(at["data-time"]) for tag, at in page.attributes if tag == "figure" and "data-time" in at]
    assert given == [axis]


def test_the_cost_is_what_was_measured(page):
    lal = next(row for row in json.loads((BENCH / "bench.json").read_text())["rows"] if row["variant"] == "lal")
    assert cells(page, f"{lal['audio_tokens']}", 11)[0] == "750"
    assert next(r for r in page.rows if r[:2] == ["750", "lal"])[2] == f"{lal['seconds'] * 1e3:,.0f}"


@pytest.mark.parametrize("budget", [0, 40_000])
def test_sound_stays_within_its_budget(root, tmp_path, budget):
    made = make([root], tmp_path / "page.html", embed=MediaEmbedder(audio_bytes=budget))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert sum(map(len, sounds(page))) <= budget
    assert bool(sounds(page)) == bool(budget)
    text = " ".join(page.text)
    assert made.left_out
    assert f"{len(made.left_out)} clips or pictures are left out" in text
    assert text.count("is left out to keep this page small") == len(made.left_out)


def test_clips_that_have_moved_are_found_by_data(root, tmp_path):
    shutil.copytree(root / "runs/lal/eval", tmp_path / "eval")
    settings = json.loads((tmp_path / "eval/settings.json").read_text())
    assert settings["root"] == str(root / "audio")
    (tmp_path / "eval/settings.json").write_text(json.dumps({**settings, "root": "/nowhere"}))
    make([tmp_path / "eval"], tmp_path / "a.html")
    lost = Page((tmp_path / "a.html").read_text())
    assert not sounds(lost) and "give the folder of the clips by --data" in " ".join(lost.text)
    make([tmp_path / "eval"], tmp_path / "b.html", embed=MediaEmbedder(roots=[root / "audio"]))
    assert len(sounds(Page((tmp_path / "b.html").read_text()))) == 4


def command(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_the_command(root, tmp_path):
    out = tmp_path / "page.html"
    done = command(root / "probe", root / "bench", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["bytes"] == out.stat().st_size
    assert [one["kind"] for one in told["found"]] == ["Cost", "Probes"]
    assert told["found"][1]["reading"] == ["Most of it looks at <b>the dog</b>."]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("runs/lal/eval/score.json", "no score.json; the run is incomplete"),
        ("runs/lal/eval/items.jsonl", "no items.jsonl; the run is incomplete"),
        ("runs/lal/train.json", "unfinished, at step 4; resume it with pal train --resume"),
        ("runs/lal/recipe.json", None),
    ],
)
def test_half_finished_folders_are_named_and_the_rest_is_shown(root, tmp_path, small_plots, file, said):
    shutil.copytree(root, tmp_path / "all")
    (tmp_path / "all" / file).unlink()
    done = command(tmp_path / "all", "--out", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert done.exit_code == (1 if said else 0)
    if said:
        assert f"note: {tmp_path / 'all' / Path(file).parent}: {said}" in done.stderr
        assert any(said in text for text in page.text)
    assert "Where it looks" in page.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("runs/lal/eval/score.json", "{"),
        ("runs/lal/eval/settings.json", "{"),
        ("runs/lal/eval/items.jsonl", "{}\n"),
        ("runs/score.json", '{"benchmark": 1}'),
        ("runs/plits/train.json", '{"recipe": {}}'),
        ("probe/probe.json", '{"probe": "attention"}'),
        ("bench/bench.json", '{"rows": []}'),
        ("bench/bench.json", "[]"),
    ],
)
def test_damaged_files_are_named_and_the_rest_is_shown(root, tmp_path, small_plots, file, content):
    shutil.copytree(root, tmp_path / "all")
    (tmp_path / "all" / file).write_text(content)
    done = command(tmp_path / "all", "--out", tmp_path / "page.html", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert len(told["faults"]) == 1 and len(told["found"]) == 6
    assert told["faults"][0].startswith(str((tmp_path / "all" / file).parent))
    assert "damaged" in told["faults"][0]
    assert Page((tmp_path / "page.html").read_text())


def test_a_damaged_picture_is_named(root, tmp_path):
    shutil.copytree(root / "probe", tmp_path / "probe")
    (tmp_path / "probe/map.png").write_bytes(b"no picture")
    done = command(tmp_path / "probe", "--out", tmp_path / "page.html")
    assert done.exit_code == 1 and "probe/map.png: damaged, not a PNG picture; make it again" in done.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("img") == 0
    assert "map.png is damaged" in page.text


def test_folders_with_nothing_to_report(root, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "page.html"
    done = command(root / "probe", tmp_path / "empty", "--out", out)
    assert done.exit_code == 1 and not out.exists()
    assert done.stderr.startswith(f"error: {tmp_path / 'empty'}: nothing to report; known kinds: training runs")
    assert len(done.stderr.splitlines()) == 1
    assert (
        command(tmp_path / "nowhere", "--out", out).stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
    )
    (tmp_path / "empty/probe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no run can be read: .*probe\.json: damaged"):
        make([tmp_path / "empty"], out)
    assert not out.exists()


def test_names_are_what_distinguishes(tmp_path):
    a, b = tmp_path / "x/lal/seed-1/eval", tmp_path / "x/pal/seed-1/eval"
    assert labels([a, b]) == ["lal", "pal"]
    assert labels([a]) == ["eval"]
    assert labels([tmp_path / "lal/score.json", tmp_path / "pal/score.json"]) == ["lal", "pal"]
    assert labels([tmp_path / "x", tmp_path / "x/y"]) == ["x", "x/y"]


def test_one_thing_given_twice_is_shown_once(root, tmp_path):
    (tmp_path / "link").symlink_to(root / "probe")
    made = make([root / "probe", tmp_path / "link", root / "probe"], tmp_path / "page.html")
    assert len(made.found) == 1


def test_the_same_folders_give_the_same_page(root, tmp_path, small_plots):
    torch.manual_seed(0)
    pages = []
    for name in ("a", "b"):
        make([root], tmp_path / name, title="x")
        text = (tmp_path / name).read_text()
        pages.append(text[: text.index("<footer>")])
    assert pages[0] == pages[1]
