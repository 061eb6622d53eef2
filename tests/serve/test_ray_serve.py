"""`pal serve --replicas 2` from its start to SIGTERM: both replicas answer as one model does, and one may be killed."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from pal.serve.replica import HEADER
from tests.counts import full_only
from tests.models import tiny_model
from tests.serve.engines import CLIPS, alone
from tests.serve.servers import KEY, part, says, user

ASK = "What sound is this?"
MOST = 120
"""Seconds after which a replica must be there."""


@contextmanager
def running(bundle, said, *options):
    """A server in a process of its own, and its URL; its errors go to the file `said`."""
    command = [sys.executable, "-m", "pal", "serve", "--model", f"tiny={bundle}", "--port", "0", "--api-key", KEY]
    with said.open("w") as errors:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        if not line and "timed out during startup" in said.read_text():
            pytest.skip("this machine is so busy that Ray's processes need over 30 s to start, three times")
        assert line, said.read_text()
        assert line.startswith("serving tiny at http://127.0.0.1:") and "2 replicas" in line
        yield process, line.split(" at ")[1].split("/v1")[0]
    finally:
        process.terminate()
        try:
            process.wait(MOST)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def replica_pids(server):
    """Process ids of the replicas; they are children of Ray's process, which is the server's child."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
    return [
        pid
        for pid, name in names.items()
        if name.startswith(b"ray::ServeReplica") and parents.get(parents[pid]) == server
    ]


async def ask_all(url, asked, retries=0):
    """(answer, replica) for each clip, with a question."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=retries, timeout=60) as client:
        calls = [
            client.chat.completions.with_raw_response.create(
                model="tiny", messages=[user(clip, says(question))], max_tokens=8
            )
            for question, clip in asked
        ]
        made = await asyncio.gather(*calls)
        return [(one.parse().choices[0].message.content, one.headers[HEADER]) for one in made]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the replicas' processes in /proc")
@full_only
@pytest.mark.torture
def test_two_replicas_answer_as_one_model_and_one_may_be_killed(tmp_path):
    model, before = tiny_model("pal"), set(Path(tempfile.gettempdir()).glob("pal-ray-*"))
    model.save_pretrained(tmp_path / "bundle", full=True)
    headers = {"Authorization": f"Bearer {KEY}"}
    with running(tmp_path / "bundle", tmp_path / "said.txt", "--replicas", "2", "--decoders", "1") as (process, url):
        asked = [(f"{ASK} {number % 5}", number % 3) for number in range(24)]
        expected = [alone(model, question, [CLIPS[clip]], 8) for question, clip in asked]
        made = asyncio.run(ask_all(url, [(question, part(CLIPS[clip])) for question, clip in asked]))
        assert [answer for answer, _ in made] == expected
        assert len({replica for _, replica in made}) == 2

        # a handle is good at both
        body = {"model": "tiny", "input_audio": part(CLIPS[1])["input_audio"]}
        indexed = httpx.post(f"{url}/v1/audio/index", json=body, headers=headers, timeout=60).json()
        handle = {"type": "input_audio", "input_audio": {"id": indexed["id"]}}
        made = asyncio.run(ask_all(url, [(ASK, handle)] * 16))
        assert {answer for answer, _ in made} == {alone(model, ASK, CLIPS[1:2], 8)}
        assert len({replica for _, replica in made}) == 2

        # errors keep their shape, and the key is needed
        made = httpx.post(f"{url}/v1/chat/completions", json={"model": "other", "messages": []}, headers=headers)
        assert (made.status_code, made.json()["error"]["param"]) == (422, "messages")
        assert httpx.get(f"{url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/ready").status_code == 200
        assert 'replica="' in httpx.get(f"{url}/metrics", headers=headers).text

        # one is killed: clients that ask again get their answers, and another takes its place
        victim = replica_pids(process.pid)[0]
        old = {replica for _, replica in made_by(url)}
        os.kill(victim, signal.SIGKILL)
        until, seen = time.monotonic() + MOST, set()
        while len(seen) < 2 or seen <= old:
            made = asyncio.run(ask_all(url, [(ASK, part(CLIPS[2]))] * 8, retries=5))
            assert {answer for answer, _ in made} == {alone(model, ASK, CLIPS[2:], 8)}
            seen = {replica for _, replica in made}
            assert time.monotonic() < until, "no replica took the killed one's place"

        # what runs at SIGTERM is answered to its end
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            stream = client.chat.completions.create(
                model="tiny", messages=[user(part(CLIPS[0]), says(ASK))], max_tokens=400, stream=True
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == alone(model, ASK, CLIPS[:1], 400)
        assert process.wait(MOST) == 0
    assert set(Path(tempfile.gettempdir()).glob("pal-ray-*")) == before


def made_by(url):
    return asyncio.run(ask_all(url, [(ASK, part(CLIPS[0]))] * 16))
