"""A server with the page in a thread, and the browser that looks at it."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pal.probe.when import attention_by_word
from pal.serve.app import create_app
from pal.serve.engine import Engine
from pal.serve.process import listen, make_server

ANSWERED = ".card:has(.answer[aria-busy=false])"


@contextmanager
def serving_page(models, options, attention=attention_by_word):
    """The server's URL and its engines by name."""
    engines = {name: Engine(name, model, batch=8, queue=32) for name, model in models.items()}
    with listen("127.0.0.1", 0) as socket:
        server = make_server(create_app(engines, replace(options, decoders=0), attention), grace=20)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}", engines
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@dataclass
class Opened:
    """A tab with the page; `expected` are errors of the console that a test provokes."""

    tab: object
    url: str
    expected: list
    errors: list
    requests: list

    def goto(self):
        self.tab.goto(self.url)
        self.tab.wait_for_selector("input[name=model], #key:visible")

    def upload(self, name, data, kind="audio/wav"):
        self.tab.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})
        self.tab.wait_for_selector(f"#clip-name:text-is('{name}')")

    def drawn(self):
        return self.tab.wait_for_selector("#spectrum[aria-label*='most energy']").get_attribute("aria-label")

    def ask(self, question, cards=2):
        before = self.tab.locator(".asked").count()
        self.tab.fill("#question", question)
        self.tab.click("#ask")
        self.tab.wait_for_selector(f".asked >> nth={before}")
        return self.answers(cards)

    def answers(self, cards=2):
        """Cards of the newest question, when all have ended."""
        self.tab.wait_for_selector("#ask:enabled")
        found = self.tab.locator(".asked").first.locator(ANSWERED)
        assert found.count() == cards
        return [found.nth(i) for i in range(cards)]

    def shown(self, place):
        """The error that is said at a place."""
        return self.tab.wait_for_selector(f"{place}:visible").inner_text()

    def posted(self, path):
        return [one.post_data_json for one in self.requests if one.url == self.url + path and one.method == "POST"]
