"""`pal push`: what goes to the Hub, and what does not."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from pal.errors import BundleError
from pal.files import MANIFEST, amend, verify
from pal.hf import PalForConditionalGeneration
from pal.hub import push
from tests.app.test_cli import run, succeed
from tests.models import pal, tiny_model


class FakeApi:
    """As much of huggingface_hub's HfApi as an upload takes; keeps what it is given in a folder."""

    calls: list[tuple[str, dict]] = []
    folder = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo, **options):
        self.calls.append(("create", {"repo": repo, **options}))
        return Url(repo)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", {"repo": repo_id, "message": commit_message}))
        for name in allow_patterns:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes((folder_path / name).read_bytes())
        return SimpleNamespace(oid="c0ffee")


class Url(str):
    def __new__(cls, repo):
        made = super().__new__(cls, f"https://hub.test/{repo}")
        made.repo_id = repo
        return made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls = []
    FakeApi.folder = tmp_path / "hub"
    FakeApi.folder.mkdir()
    return FakeApi


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def fail(*arguments, says):
    result = run("push", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


def test_a_bundle_arrives_whole(hub, folder):
    (folder / "notes.txt").write_text("not the bundle's")
    (folder / "README.md").write_text("# written later")
    found = json.loads(succeed("push", folder, "me/model", "--private", "--message", "First", "--json").stdout)
    assert hub.calls == [
        ("create", {"repo": "me/model", "private": True, "exist_ok": True}),
        ("upload", {"repo": "me/model", "message": "First"}),
    ]
    assert (found["repo"], found["url"], found["commit"]) == ("me/model", "https://hub.test/me/model", "c0ffee")
    names = sorted(path.name for path in hub.folder.rglob("*"))
    assert names == sorted(found["files"]) == sorted([*verify(folder), MANIFEST, "README.md"])
    assert found["size"] == sum(path.stat().st_size for path in hub.folder.rglob("*"))
    assert pal.load(hub.folder).digest == tiny_model().digest


def test_a_runs_folder_and_plain_words(hub, folder):
    result = succeed("push", folder.parent, "me/model")
    assert result.stdout.startswith("https://hub.test/me/model: ")
    assert hub.calls[0][1]["private"] is None


def test_a_changed_file_is_not_uploaded(hub, folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fail(folder, "me/model", says="SHA-256")
    assert hub.calls == []


def test_a_bundle_that_others_could_not_load_is_not_uploaded(hub, tmp_path):
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    model = tiny_model(llm=str(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "part")
    fail(tmp_path / "part", "me/model", says="full=True")
    assert hub.calls == []
    model.save_pretrained(tmp_path / "all", full=True)
    succeed("push", tmp_path / "all", "me/model")


def test_a_model_known_by_name_is_no_folder(hub, tmp_path, monkeypatch):
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_model(llm=str(tmp_path / "llm")).save_pretrained(tmp_path / "part")
    description = json.loads((tmp_path / "part" / "config.json").read_text())
    description["model"]["llm"]["path"] = "smollm2-135m-instruct"
    amend(tmp_path / "part", {"config.json": json.dumps(description).encode()})
    (tmp_path / "smollm2-135m-instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    succeed("push", tmp_path / "part", "me/model")


@pytest.mark.parametrize("repo", ["a/b/c", "me/-x-", "two words"])
def test_ids_that_are_none(hub, folder, repo):
    fail(folder, repo, says="is no Hub id; write it as name/model")
    assert hub.calls == []


def test_no_folder(hub, tmp_path):
    fail(tmp_path / "gone", "me/model", says="no such folder")
    fail(tmp_path, "me/model", says="not a bundle")


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (500, "check the connection")])
def test_a_hub_that_refuses(monkeypatch, folder, status, says):
    """The real client against a server that says no."""

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = __import__("huggingface_hub").HfApi
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api(endpoint=endpoint, token="none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        fail(folder, "me/model", says=says)
    finally:
        server.shutdown()
        server.server_close()


def test_from_python(hub, folder):
    pushed = push(folder, "me/model", private=False)
    assert pushed.commit == "c0ffee"
    assert hub.calls[0][1]["private"] is False
    PalForConditionalGeneration.wrap(pal.load(folder)).push_to_hub("me/other", private=True)
    assert hub.calls[2][1] == {"repo": "me/other", "private": True, "exist_ok": True}
    assert pal.load(hub.folder).digest == tiny_model().digest
    with pytest.raises(BundleError, match="no Hub id"):
        push(folder, "no id")
