"""The whole demo at a very small size: what it writes, that it goes on, and that its page stands alone."""

import base64
import json

import pytest

import pal
from pal.app import demo
from pal.errors import BundleError
from pal.report.join import make
from tests.html_page import Page


@pytest.fixture(scope="module")
def small(assets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SHIPPED", assets.bundle)
        patch.setattr(demo, "TEXT_LLM", assets.llm)
        patch.setattr("pal.shipped.default", lambda: "smol")
        patch.setitem(pal.shipped.FOLDERS, "smol", assets.bundle)
        patch.setattr(demo, "HELD_OUT", {"scenes": 4, "questions_per_scene": 2, "seconds": 1.5})
        patch.setattr(demo, "MEASURED_CLIPS", 2)
        yield assets


@pytest.fixture(scope="module")
def out(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.run_demo(folder, recipe_path=small.demo)
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


def test_results_hold_the_comparison(results):
    assert list(results["integrations"]) == ["plits", "lal", "pal"]
    for one in results["integrations"].values():
        # Captions have no choices and are not asked: at most 8 of 8.
        assert 0 < one["accuracy"]["n"] == results["data"]["held_out_questions"] <= 8
        assert one["errors"] == 0
        assert sum(task["n"] for task in one["per_task"].values()) == one["accuracy"]["n"]
        assert all(value > 0 for value in one["cost"].values())
        assert one["training"]["steps"] == 2
        assert len(one["training"]["loss_curve"]) == 2
    assert results["integrations"]["plits"]["minus_plits"] == {"difference": 0.0, "ci95": [0.0, 0.0]}
    costs = {name: one["cost"] for name, one in results["integrations"].items()}
    assert costs["lal"]["saved_bytes"] < costs["plits"]["saved_bytes"]
    # keys and values of A tokens in all 3 layers, whether as rows or not: LAL saves no cache
    assert costs["lal"]["audio_kv_bytes"] == costs["plits"]["audio_kv_bytes"]
    # a third of the layers at full resolution and a third of the tokens in all of them
    assert costs["pal"]["audio_kv_bytes"] < 0.8 * costs["plits"]["audio_kv_bytes"]
    assert len(results["fresh_scene"]["questions"]) == 5
    assert results["fresh_scene"]["events"]


def test_all_start_from_the_same_encoder_and_llm(out, small):
    settings = [json.loads((out / name / "recipe.json").read_text())["recipe"] for name in demo.METHODS]
    for recipe, name in zip(settings, demo.METHODS, strict=True):
        assert recipe["model"].pop("integration") == {"name": name}
        assert recipe["start"] == {"encoder": str(small.bundle)}
        assert recipe["model"]["llm"]["path"] == str(small.llm)
    assert settings[0] == settings[1] == settings[2]


def test_page_stands_alone_and_says_what_the_results_say(out, results):
    source = (out / "report.html").read_text()
    page = Page(source)
    assert len(page.sources) == 2 + 4  # two sounds, four pictures
    assert all(one.startswith("data:") for one in page.sources)
    assert "http" not in source.replace("http-equiv", "")
    audio = next(one for one in page.sources if one.startswith("data:audio/wav;base64,"))
    assert base64.b64decode(audio.partition(",")[2])[:4] == b"RIFF"
    pictures = [one for one in page.sources if one.startswith("data:image/png;base64,")]
    assert all(base64.b64decode(one.partition(",")[2])[:8] == b"\x89PNG\r\n\x1a\n" for one in pictures)
    assert len(pictures) == 4  # accuracy, losses, the fresh scene, the real recording
    text = " ".join(page.text)
    for one in results["integrations"].values():
        assert f"{one['accuracy']['score'] * 100:.1f}" in text
    for question in results["fresh_scene"]["questions"]:
        assert question["question"] in text
        assert question["truth"] in text


def test_it_ends_with_a_real_recording_asked_of_smol(out, results, capsys):
    recording = results["recording"]
    assert (recording["file"], recording["model"]) == ("dog.ogg", "smol")
    answers = [one["answer"] for one in recording["questions"]]
    assert answers == pal.load("smol").ask(str(pal.shipped.RECORDING), list(demo.QUESTIONS))
    text = " ".join(Page((out / "report.html").read_text()).text)
    assert "A real recording" in text
    assert all(one["question"] in text and one["answer"] in text for one in recording["questions"])
    demo.print_recording(demo.Console(), recording)
    assert all(question in capsys.readouterr().out for question in demo.QUESTIONS[:1])


def test_without_the_pretrained_models_it_ends_before(monkeypatch):
    monkeypatch.setattr("pal.shipped.default", lambda: "tiny")
    assert demo.real_recording() is None


def test_it_can_be_joined_with_others(out, results, tmp_path):
    made = make([out], tmp_path / "page.html")
    assert made.faults == []
    assert [one["kind"] for one in made.found] == [*["Training"] * 3, *["Scores"] * 3, "The demo"]
    page = Page((tmp_path / "page.html").read_text())
    text = " ".join(page.text)
    for question in results["fresh_scene"]["questions"]:
        assert question["question"] in text
    accuracy = results["integrations"]["lal"]["accuracy"]["score"]
    assert next(row for row in page.rows if row[0] == "lal" and len(row) == 8)[1] == f"{accuracy:.3f}"
    assert page.tags.count("img") == 5  # losses; scores of all, by task and by duration; the fresh scene


def test_a_second_run_does_nothing_again(out, small, results, monkeypatch):
    def never(*args, **options):
        raise AssertionError("done before")

    monkeypatch.setattr(demo, "evaluate", never)
    monkeypatch.setattr(demo, "synthesise", never)
    monkeypatch.setattr("pal.train.step.Update.__call__", never)
    again = demo.run_demo(out, recipe_path=small.demo)
    for name in demo.METHODS:
        for key in ("accuracy", "training", "model_digest"):
            assert json.loads(json.dumps(again["integrations"][name][key])) == results["integrations"][name][key]


def test_measuring_leaves_the_weights_alone(out, results):
    from pal import load

    for name in demo.METHODS:
        assert load(out / name).digest == results["integrations"][name]["model_digest"]


def test_quick_scales_the_recipe(small):
    from pal.train.recipe import load_recipe

    full = load_recipe(small.demo, ["stages.0.steps=1000", "stages.0.warmup=100", "data.scenes.synth.scenes=2000"])
    quick = demo.scaled(full, quick=True)
    assert (quick.stages[0].steps, quick.stages[0].warmup) == (40, 4)
    assert quick.data["scenes"].synth.scenes == 80
    assert demo.scaled(full, quick=False) == full


@pytest.mark.parametrize("missing", ["SHIPPED", "TEXT_LLM"])
def test_missing_model_is_said_at_once(small, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(demo, missing, tmp_path / "nowhere")
    with pytest.raises(BundleError, match="missing; run `pal doctor` for the remedy"):
        demo.run_demo(tmp_path / "out", recipe_path=small.demo)
    assert not (tmp_path / "out").exists()
