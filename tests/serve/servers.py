"""A server in a thread, and clips as clients send them."""

import base64
import io
import threading
from contextlib import contextmanager
from dataclasses import replace

import openai
import soundfile

from pal.serve.app import create_app
from pal.serve.engine import Engine
from pal.serve.process import listen, make_server

KEY = "the key"


def wav(samples_N, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples_N.numpy(), 16_000, format=format)
    return file.getvalue()


def part(samples_N):
    """A clip as a part of a message."""
    data = base64.b64encode(wav(samples_N)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def says(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


class Running:
    """A server that runs."""

    def __init__(self, server, port, engine):
        self.server, self.engine = server, engine
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key=KEY, **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **more)

    def asynchronous(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@contextmanager
def serving(model, options, name="tiny", processes=None, replica=None, **engine):
    """A server; clips are decoded in its own process unless there are others, since those take seconds to start."""
    engines = {name: Engine(name, model, **engine)}
    with serving_all(engines, options, processes, replica) as running:
        yield running


@contextmanager
def serving_all(engines, options, processes=None, replica=None):
    """A server of several engines by name; its `engine` is the first one."""
    options = replace(options, decoders=0)
    with listen("127.0.0.1", 0) as socket:
        server = make_server(create_app(engines, options, processes=processes, replica=replica), grace=20)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield Running(server, socket.getsockname()[1], next(iter(engines.values())))
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
