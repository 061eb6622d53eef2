"""One page from folders of every kind, made by the code that really makes them."""

import shutil
from pathlib import Path

import pytest

from pal import train
from pal.data.manifest import Manifest
from pal.data.synth import synthesise
from pal.evaluate import evaluate, from_records
from pal.evaluate.benchmark import Benchmark
from pal.evaluate.items import Item
from pal.plots import TIME
from pal.probe.probe_result import Plot, ProbeResult
from pal.report import demo
from pal.report.join import make
from tests import published
from tests.models import noise, tiny_model
from tests.train import tiny

BENCH = Path(__file__).parents[2] / "docs/benchmarks/cpu"
EVIL = 'Is it </p><script src="https://example.org/x.js">alert("1")</script> & "so"?'
AREA = (0.2, 0.1, 0.7, 0.6)
"""Of the heat-map: left, bottom, width and height in fractions of the picture."""


def probe_result():
    def draw(figure):
        figure.set_layout_engine("none")
        axes = figure.add_axes(AREA, facecolor="red", xlim=(0.0, 0.5))
        axes.set_gid(TIME)
        axes.set_axis_on()
        for spine in axes.spines.values():
            spine.set_visible(False)

    return ProbeResult(
        probe="attention",
        model={"source": "x", "digest": "abc"},
        settings={"seed": 0},
        reading=["Most of it looks at <b>the dog</b>."],
        tables={"Mass on audio": [{"layer": 1, "mass": 0.25, "ci95": (0.2, 0.3)}]},
        pictures={"map": Plot("Where it looks", "Bright is much.", draw, clip="dog")},
        clips={"dog": (noise(0.5), 16_000), "cat": (noise(0.25, rate=8_000), 8_000)},
    )


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("all")
    manifest = synthesise(root / "scenes", scenes=4, seed=5, seconds=1.5, questions_per_scene=3, workers=1)
    stages = [{**tiny.READ, "steps": 2}, {**tiny.JOIN, "epochs": None, "steps": 2, "batch": {"clips": 2}}]
    items = []
    for number in range(4):
        path = root / "audio" / f"{number}.wav"
        published.clip(path, 0.1 + 0.1 * number)
        items.append(Item(f"{number}", (str(path),), EVIL, ("yes",), ("yes", "no"), {"asks": (f"k{number % 2}",)}))
    benchmark = Benchmark("made", tuple(items), {"name": "rank"}, root / "audio")
    for name in ("lal", "plits"):
        recipe = tiny.recipe(manifest, stages, model={**tiny.MODEL, "integration": name})
        train.run(recipe, root / "runs" / name)
        evaluate(tiny_model(name), benchmark, root / "runs" / name / "eval", progress=False)
    score = evaluate(tiny_model("pal"), from_records(Manifest(manifest), "scenes"), progress=False)
    score.save(root / "runs" / "score.json")
    probe_result().save(root / "probe")
    shutil.copytree(BENCH, root / "bench")
    return root


@pytest.fixture(scope="session")
def made(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    return make([root], out, title='A & "B"')


@pytest.fixture(scope="session")
def joined_page(root, tmp_path_factory):
    """The page of everything."""
    out = tmp_path_factory.mktemp("joined") / "page.html"
    make([root], out, title="Everything")
    return out


@pytest.fixture(scope="session")
def demo_page(tmp_path_factory):
    """The demo's own page, with made-up numbers as large as they may be."""
    folder = tmp_path_factory.mktemp("demo-page")
    published.clip(folder / "scene.wav", 1.0)
    score = {"n": 2100, "score": 1.0, "ci95": [0.988, 1.0], "no_audio_score": 0.342, "no_audio_ci95": [0.32, 0.36]}
    score |= {"gain": 0.658, "gain_ci95": [0.52, 0.7]}
    one = {
        "accuracy": score,
        "per_task": dict.fromkeys(("count", "loudness", "order"), score),
        "minus_plits": {"difference": -0.01, "ci95": [-0.02, 0.01]},
        "cost": {
            "step_seconds": 1801.0,
            "peak_bytes": 117_350_792_000,
            "saved_bytes": 112_731_628_000,
            "audio_kv_bytes": 204_800,
            "parameters": 2_001_664_000,
            "trained_parameters": 838_016_000,
        },
        "training": {"seconds": 51_568.6, "step_seconds": 0.35, "steps": 700, "loss_curve": [[10, 2.0], [20, 1.0]]},
    }
    names = ("plits", "lal", "pal")
    asked = {
        "question": f"{EVIL} {'word' * 30}",
        "truth": "a low note, then a loud bell",
        "answers": dict.fromkeys(names, "a loud bell, then a low note"),
        "correct": {"plits": True, "lal": False, "pal": True},
    }
    results = {
        "pal_version": "0",
        "quick": True,
        "seed": 0,
        "machine": {"system": "Linux", "cpu_cores": 2, "gpu": None, "torch": "2"},
        "seconds": 1655.7,
        "data": {
            "held_out_scenes": 600,
            "held_out_questions": 2100,
            "measured_batch": {"clips": 16, "questions": 64},
        },
        "integrations": dict.fromkeys(names, one),
        "fresh_scene": {
            "file": "scene.wav",
            "events": [{"label": "bell", "start": 0.1, "end": 0.6}],
            "questions": [asked],
        },
        "recording": {"model": "smol", "questions": [{"question": "What is this?", "answer": "a dog"}]},
    }
    demo.write_page(folder / "report.html", results, folder / "scene.wav")
    return folder / "report.html"


@pytest.fixture(params=["joined", "demo"])
def report_page(request):
    """Each kind of page."""
    return request.getfixturevalue(f"{request.param}_page")
