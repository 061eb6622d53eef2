"""`pal serve`: which models it takes, and a process from its start to SIGTERM."""

import signal
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from pal.app import cli, serving
from pal.app.serving import named
from pal.errors import ConfigError


def test_names_of_models():
    assert named(None, []) == {"": None}
    assert named("runs/mine", []) == {"mine": "runs/mine"}
    assert named(None, ["a=runs/a", "b=runs/b=2"]) == {"a": "runs/a", "b": "runs/b=2"}
    for model, models in ((None, ["a"]), (None, ["a=x", "a=y"]), ("runs/a", ["a=x"]), (None, ["=x"])):
        with pytest.raises(ConfigError):
            named(model, models)


def test_without_its_packages_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pal.serve.app", None)
    made = CliRunner().invoke(cli.app, ["serve", "tiny"])
    assert made.exit_code == 1 and serving.MISSING in made.output and len(made.output.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line():
    with taken_port() as port:
        made = CliRunner().invoke(cli.app, ["serve", "tiny", "--port", str(port)])
    assert made.exit_code == 1 and len(made.output.splitlines()) == 1 and "in use" in made.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-gpus", "1"], "--num-gpus is of replicas; give --replicas, too"),
        (["--replicas", "2", "--max-replicas", "1"], "max_replicas is 1, below replicas, which is 2"),
        (["--replicas", "2", "--num-gpus", "9"], "18 GPUs are needed, and there are"),
        (["--api-key", " "], "the API key is empty"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_one_line(options, said):
    made = CliRunner().invoke(cli.app, ["serve", "tiny", *options])
    assert made.exit_code == 1 and len(made.output.splitlines()) == 1 and said in made.output


def taken_port():
    from contextlib import contextmanager

    from pal.serve.process import listen

    @contextmanager
    def taken():
        with listen("127.0.0.1", 0) as socket:
            yield socket.getsockname()[1]

    return taken()


def test_a_process_serves_until_sigterm():
    process = subprocess.Popen(
        [sys.executable, "-m", "pal", "serve", "tiny", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        url = line.split(" at ")[1].split("/v1")[0]
        assert line.startswith("serving tiny at http://127.0.0.1:")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 3}
        made = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        assert made["choices"][0]["message"]["role"] == "assistant"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
