"""Every command on a small real model: its output, its JSON, and its status."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import yaml
from typer.testing import CliRunner

import pal
from pal.app import cli
from pal.backbone.audio_kv import AudioKV
from tests.app.conftest import NOTICE, STAGE
from tests.counts import full_only
from tests.processes import PATIENCE

RUNNER = CliRunner()
QUESTION = "What sound is this?"


def run(*arguments):
    return RUNNER.invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def clip(scenes):
    return scenes.parent / "audio" / "000000.wav"


def test_help_and_doctor_import_nothing_heavy():
    program = (
        "import sys\n"
        "from pal.app import cli\n"
        "for arguments in (['--help'], ['ask', '--help'], ['train', '--help'], ['data', 'check', '--help'], ['convert', '--help'], ['bench', '--help'], ['doctor']):\n"
        "    try:\n"
        "        cli.app(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'peft', 'scipy', 'matplotlib', 'huggingface_hub'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    for command in ("ask", "train", "eval", "demo", "doctor", "index", "data", "convert", "bench"):
        assert command in done.stdout


def test_version():
    import pal

    assert succeed("--version").stdout.strip() == pal.__version__


def test_ask(shipped, clip):
    result = succeed("ask", clip, QUESTION)
    assert result.stderr == f"note: {pal.shipped.explain('tiny')}\nnote: {NOTICE}\n"
    assert result.stdout.strip() == pal.load().ask(str(clip), QUESTION)
    named = succeed("ask", clip, QUESTION, "--model", "tiny")  # a model that was asked for needs no explanation
    assert (named.stdout, named.stderr) == (result.stdout, f"note: {NOTICE}\n")


def test_ask_json(shipped, clip):
    found = json.loads(succeed("ask", clip, QUESTION, "--json").stdout)
    assert list(found) == [
        *("answer", "model", "integration", "audio_seconds", "audio_seconds_used", "audio_tokens", "seconds", "notes")
    ]
    assert found["notes"] == []
    assert list(found["seconds"]) == ["load", "encode", "prefill", "generate"]
    assert all(value >= 0 for value in found["seconds"].values())
    assert (found["model"], found["integration"]) == ("tiny", "pal")
    assert found["audio_seconds"] == pytest.approx(1.5)
    assert found["audio_seconds_used"] == pytest.approx(1.5, abs=0.05)
    assert found["audio_tokens"] > 20


def test_ask_two_clips(shipped, scenes, clip):
    other = scenes.parent / "audio" / "000001.wav"
    both = json.loads(succeed("ask", clip, other, QUESTION, "--json").stdout)
    assert both["audio_seconds"] == pytest.approx(3.0)
    placed = json.loads(succeed("ask", clip, other, f"<audio><audio>{QUESTION}", "--json").stdout)
    assert placed["answer"] == both["answer"]


def test_an_index_of_several_clips_is_asked_about_all(shipped, scenes, clip, tmp_path):
    other = scenes.parent / "audio" / "000001.wav"
    model = pal.load(shipped.bundle)
    AudioKV.concat([model.index(clip), model.index(other)]).save(tmp_path / "two.safetensors")
    both = json.loads(succeed("ask", tmp_path / "two.safetensors", QUESTION, "--json").stdout)
    apart = json.loads(succeed("ask", clip, other, QUESTION, "--json").stdout)
    assert (both["answer"], both["audio_tokens"]) == (apart["answer"], apart["audio_tokens"])
    assert "holds 2" in run("ask", tmp_path / "two.safetensors", QUESTION, "--when").stderr


def test_index_then_ask(shipped, clip, tmp_path):
    file = tmp_path / "made" / "clip.safetensors"
    facts = json.loads(succeed("index", clip, "--out", file, "--json").stdout)
    assert facts["bytes"] == file.stat().st_size
    assert facts["audio_seconds"] == pytest.approx(1.5, abs=0.05)
    stored = json.loads(succeed("ask", file, QUESTION, "--json").stdout)
    direct = json.loads(succeed("ask", clip, QUESTION, "--json").stdout)
    assert stored["answer"] == direct["answer"]
    assert stored["audio_tokens"] == direct["audio_tokens"]
    assert "tokens" in succeed("index", clip, "--out", file).stdout
    assert run("index", clip, "--out", tmp_path / "clip.bin").exit_code == 2
    assert f"{clip.stem}.safetensors" in run("index", clip).stderr


def test_train_and_eval(shipped, tmp_path):
    recipe = tmp_path / "small.yaml"
    fields = {"bundle": str(shipped.bundle), "data": {"s": {"manifest": str(shipped.scenes)}}, "stages": [STAGE]}
    recipe.write_text(yaml.safe_dump(fields))
    out = tmp_path / "run"
    facts = json.loads(succeed("train", recipe, "--set", "stages.0.steps=1", "--out", out, "--json").stdout)
    assert facts["out"] == str(out)
    assert json.loads((out / "train.json").read_text())["stages"][0]["steps"] == 1
    again = run("train", recipe, "--set", "stages.0.steps=1", "--out", out)
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    resumed = succeed("train", recipe, "--set", "stages.0.steps=1", "--out", out, "--resume")
    assert f"--model {out}" in resumed.stdout

    score = tmp_path / "score.json"
    shown = succeed("eval", out, shipped.scenes, "--json", score, "--limit", 5)
    assert "no audio" in shown.stdout
    found = json.loads(score.read_text())
    assert (found["n"], found["metric"], found["benchmark"]) == (5, "exact_match", "manifest")
    assert found["settings"]["model_digest"] == facts["model_digest"]
    ranked = json.loads(succeed("eval", out, shipped.scenes, "--scoring", "rank", "--json", "-").stdout)
    assert ranked["metric"] == "rank_accuracy"
    assert all(item["output"] for item in ranked["items"])


def test_eval_of_a_data_set(shipped, tmp_path):
    for name in ("3_ann_0", "4_ann_0", "3_bob_0"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(size=4000) / 10, 8000)
    found = json.loads(
        succeed("eval", "tiny", "fsdd", "--data", tmp_path, "--speakers", "ann", "--only-audio", "--json", "-").stdout
    )
    assert found["benchmark"] == "fsdd"
    assert [item["references"] for item in found["items"]] == [["three"], ["four"]]
    assert found["settings"]["options"] == {"speakers": "ann"}
    assert found["no_audio_score"] is None
    assert "needs its folder: --data" in run("eval", "tiny", "fsdd").stderr


def test_data_commands(shipped, tmp_path):
    made = json.loads(succeed("data", "synth", "--out", tmp_path / "s", "--scenes", 2, "--seed", 3, "--json").stdout)
    assert made["scenes"] == 2
    report = json.loads(succeed("data", "check", made["manifest"], "--json").stdout)
    assert (report["ok"], report["records"], report["clips"]) == (True, made["records"], 2)
    assert "⟦" in report["example"]
    assert "ok" in succeed("data", "check", made["manifest"]).stdout

    soundfile.write(tmp_path / "7_ann_0.wav", np.zeros(4000) + 0.1, 8000)
    out = tmp_path / "fsdd.jsonl"
    arguments = ("data", "prepare", "fsdd", "--root", tmp_path, "--out", out, "--set", "paraphrase=true")
    assert json.loads(succeed(*arguments, "--json").stdout) == {"out": str(out), "records": 1}
    assert succeed(*arguments).stdout.endswith(": 1 records\n")
    assert run(*arguments, "--set", "nonsense").exit_code == 1


def test_data_check_of_a_bad_manifest(shipped, tmp_path):
    manifest = tmp_path / "bad.jsonl"
    row = {"instruction": "What?", "input": "", "audio_id": "gone.wav", "dataset": "d", "task": "t", "output": "dog"}
    manifest.write_text(json.dumps(row) + "\n")
    result = run("data", "check", manifest)
    assert result.exit_code == 1
    assert "gone.wav" in result.stdout


def test_doctor_json(assets, monkeypatch):
    monkeypatch.setattr("pal.app.doctor.SHIPPED", assets.bundle)
    monkeypatch.setattr("pal.app.doctor.TEXT_LLM", assets.llm)
    found = json.loads(succeed("doctor", "--json").stdout)
    assert found["ok"] is True
    assert {"name", "ok", "detail", "remedy", "required"} == set(found["checks"][0])
    monkeypatch.setattr("pal.app.doctor.SHIPPED", assets.folder / "nowhere")
    result = run("doctor")
    assert result.exit_code == 1
    assert "remedy: pip install" in result.stdout


def test_demo_prints_json(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("pal.app.demo.run_demo", lambda *a, **k: calls.append((a, k)) or {"quick": True})
    assert json.loads(succeed("demo", "--quick", "--seed", 3, "--out", tmp_path, "--json").stdout) == {"quick": True}
    assert calls == [((tmp_path,), {"quick": True, "seed": 3})]


@pytest.mark.parametrize(("fault", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)])
def test_faults_end_in_one_line(monkeypatch, tmp_path, fault, status):
    def fail(*arguments, **options):
        raise fault

    monkeypatch.setattr("pal.app.demo.run_demo", fail)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == status
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.torture
@full_only  # tests/train/test_resume.py sends signals within a process
def test_ctrl_c_while_training_saves_and_says_how_to_go_on(shipped, tmp_path):
    recipe = tmp_path / "long.yaml"
    stage = STAGE | {"steps": 100_000}
    fields = {"bundle": str(shipped.bundle), "data": {"s": {"manifest": str(shipped.scenes)}}, "stages": [stage]}
    recipe.write_text(yaml.safe_dump(fields | {"keep": {"log_every": 1}}))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pal", "train", str(recipe), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert list((out / "checkpoints").iterdir())
