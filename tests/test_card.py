"""Model cards: what stands in them is what the bundle, the run and the scores say."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pal.card import card, write_card
from pal.errors import BundleError, ConfigError
from pal.evaluate import evaluate
from pal.files import MANIFEST, verify
from tests.models import noise, pal, tiny_model

# split, since this file is one of those looked through
REGISTRIES = [
    rf"{name}\.{ending}"
    for name, ending in [
        ("py" + "pi", "org"),
        ("python" + "hosted", "org"),
        ("download\\.py" + "torch", "org"),
        ("anaconda", "(org|com)"),
        ("npm" + "js", "(org|com)"),
        ("crates", "io"),
        ("docker", "(io|com)"),
        ("rubygems", "org"),
        ("ghcr", "io"),
    ]
]


def header(text):
    """The YAML block that the Hub reads."""
    _, block, body = text.split("---\n", 2)
    return yaml.safe_load(block), body


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A bundle, and the score of its model on two made-up records."""
    import soundfile

    from pal.data.manifest import Manifest

    folder = tmp_path_factory.mktemp("card")
    tiny_model(notice="a toy").save_pretrained(folder / "run" / "model")
    rows = []
    for i, (answer, task) in enumerate([("yes", "whether"), ("no", "whether"), ("a loud siren", "what")]):
        soundfile.write(folder / f"{i}.wav", noise(0.4, i).numpy(), 16_000)
        row = {"instruction": "What sound is this?", "input": "", "audio_id": f"{i}.wav", "dataset": "d"}
        rows.append({**row, "task": task, "output": answer})
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = evaluate(pal.load(folder / "run"), Manifest(folder / "held_out.jsonl"), progress=False)
    score.save(folder / "score.json")
    report = {
        "recipe": {
            "data": {
                "made": {"synth": {"scenes": 12, "seed": 7}},
                "esc": {"prepare": {"name": "esc50", "root": "/somewhere/esc", "options": {"folds": "1,2"}}},
                "own": {"manifest": "/somewhere/else/mine.jsonl"},
            }
        },
        "data": {"made": {}, "esc": {}, "own": {}},
    }
    (folder / "run" / "train.json").write_text(json.dumps(report))
    return folder, score


def test_a_card_of_a_run(scored):
    folder, score = scored
    text = write_card(folder / "run", [folder / "score.json"], data=["the makers' voices"], license_name="mit").text
    top, body = header(text)
    assert (top["pipeline_tag"], top["library_name"], top["license"]) == ("audio-text-to-text", "pal-audio", "mit")
    assert "base_model" not in top, "all parts were trained from nothing"
    (result,) = top["model-index"][0]["results"]
    assert result["dataset"]["name"] == "held_out"
    assert result["metrics"] == [{"type": "exact_match", "value": round(score.score, 4)}]
    low, high = score.overall.ci95
    expected = f"| held_out | all | 3 | exact match | {score.score:.3f} | {low:.3f} to {high:.3f} | "
    assert expected + f"{score.overall.no_audio_score:.3f} |" in body
    assert "| held_out | whether | 2 |" in body
    for line in (
        "- the makers' voices",
        "- `made`: scenes of `pal data synth` (scenes: 12, seed: 7)",
        "- `esc`: the data set `esc50` (folds: 1,2)",
        "- `own`: the manifest mine.jsonl",
        "- The model's notice: a toy.",
        "not measurably better than without the audio",
    ):
        assert line in body, line
    assert "/somewhere" not in text, "a path of somebody's machine"
    for part, module in pal.load(folder / "run").parts().items():
        assert f"| {part} |" in body
        assert f"| {sum(p.numel() for p in module.parameters()):,} |" in body


def test_base_models_are_hub_ids():
    model = tiny_model()
    config = model.config
    llm = config.llm.model_copy(update={"path": "meta-llama/Llama-3.2-1B", "fresh": None})
    encoders = [{"name": "whisper", "path": "openai/whisper-small"}, {"name": "tiny"}]
    model.config = config.model_copy(update={"llm": llm, "encoders": encoders})
    top, body = header(card(model, "x", left_out={"llm.weight": "0"}))
    assert top["base_model"] == ["meta-llama/Llama-3.2-1B", "openai/whisper-small"]
    assert "`meta-llama/Llama-3.2-1B` with `openai/whisper-small` and `tiny`" in body
    assert "loaded from their source and checked by SHA-256" in body
    named = {"path": "smollm2-135m-instruct", "fresh": None}
    encoders = [{"name": "whisper", "path": "whisper-tiny.en"}]
    model.config = config.model_copy(update={"llm": llm.model_copy(update=named), "encoders": encoders})
    top, _ = header(card(model, "x"))
    assert top["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-tiny.en"]


def test_folders_are_no_base_models(tmp_path):
    model = tiny_model()
    llm = model.config.llm.model_copy(update={"path": str(tmp_path), "fresh": None})
    model.config = model.config.model_copy(update={"llm": llm})
    top, _ = header(card(model, "x"))
    assert "base_model" not in top


def test_it_names_the_package_without_an_address():
    """Nothing is published, so a link would lead nowhere."""
    _, body = header(card(tiny_model(), "x"))
    assert "the package `pal-audio`" in body
    assert "://" not in body.replace("https://huggingface.co", "")


def test_no_file_names_a_registry():
    """An address in a README, a Makefile or a generated card would promise what is not there, or bind users to it."""
    root = Path(__file__).parent.parent
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True).stdout.split("\0")
    files = [root / name for name in names if name and (root / name).is_file()] or [
        path
        for folder in ("pal", "docs", "recipes", "examples", "tests")
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 100
    address = re.compile("|".join(REGISTRIES).encode(), re.IGNORECASE)
    found = [str(path) for path in files if address.search(path.read_bytes())]
    assert not found
    assert address.search(b"see https://" + b"py" + b"pi.org/project/x"), "the check can fail"


def test_a_card_without_scores_says_so():
    top, body = header(card(tiny_model(), "x"))
    assert "model-index" not in top
    assert "Nothing yet." in body
    assert "## Trained on\n\nNot stated." in body


def test_it_goes_into_the_bundle(scored, tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    made = write_card(tmp_path / "m", into_bundle=True)
    assert (tmp_path / "m" / "README.md").read_text() == made.text
    assert "README.md" in verify(tmp_path / "m")
    assert pal.load(tmp_path / "m").digest == tiny_model().digest
    assert "README.md" in (tmp_path / "m" / MANIFEST).read_text()


def test_scores_of_another_model_are_refused(scored, tmp_path):
    folder, _ = scored
    tiny_model(seed=1).save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"score\.json: the score of another model; evaluate this one"):
        write_card(tmp_path / "m", [folder / "score.json"])


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"benchmark": "x"}'])
def test_files_that_are_no_scores(scored, tmp_path, content):
    folder, _ = scored
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    with pytest.raises(BundleError, match=r"s\.json: .*a file of pal eval --json") as caught:
        write_card(folder / "run", [tmp_path / "s.json"])
    assert "\n" not in str(caught.value)


def test_the_command(scored):
    from tests.app.test_cli import run, succeed

    folder, _ = scored
    shown = succeed("card", folder / "run", "--scores", folder / "score.json").stdout
    assert shown.strip() == write_card(folder / "run", [folder / "score.json"]).text.strip()
    found = json.loads(succeed("card", folder / "run", "--write", "--json", "--license", "mit").stdout)
    assert found["out"] == str(folder / "run" / "model" / "README.md")
    assert (folder / "run" / "model" / "README.md").read_text() == found["card"]
    wrong = run("card", folder / "nowhere")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
