"""What the page is made of, without a browser: files, headers, examples, attention."""

import io
import re
import threading
from pathlib import Path

import httpx
import pytest
import soundfile

from pal import shipped
from pal.errors import PalError
from pal.probe.when import attention_by_word
from pal.serve import examples, page_routes
from pal.serve.page_routes import FILES
from pal.serve.requests import Computed, EngineRequest
from pal.serve.sampling import SamplingOptions
from pal.serve.served import ServeOptions
from tests.browser import browser
from tests.html_page import Page
from tests.models import tiny_model
from tests.serve.engines import CLIPS, Asked, alone, ask, clip_of
from tests.serve.page_server import serving_page
from tests.serve.servers import KEY, part, wav

ASK = "What sound is this?"
FOLDER = Path(page_routes.__file__).parent / "page"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def model():
    return tiny_model("pal")


@pytest.fixture(scope="module")
def served(model):
    with serving_page({"one": model, "two": model}, ServeOptions(api_key=KEY)) as (url, engines):
        yield url, engines


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served[0], timeout=60) as made:
        yield made


def test_the_documentation_of_the_endpoints_has_all_fields_and_nothing_of_others(client):
    made = client.get("/docs")
    assert made.headers["content-security-policy"].startswith("default-src 'none'")
    page, schema = Page(made.text), client.get("/openapi.json").json()
    assert page.sources and all(source.startswith("/") and not source.startswith("//") for source in page.sources)
    text = " ".join(page.text)
    assert all(f"{method.upper()} {path}" in text for path, methods in schema["paths"].items() for method in methods)
    for name in ("ChatRequest", "IndexRequest"):
        fields = schema["components"]["schemas"][name]["properties"]
        assert fields and all(f"{field} :" in text for field in fields)
    assert "messages : list of Message, required" in text
    assert "seed : integer or null" in text and "seed : integer or null, required" not in text
    assert client.get("/redoc").status_code == 404


def test_files_are_served_by_name_alone_under_a_strict_policy(client):
    assert {path.name for path in FOLDER.iterdir()} == {"index.html", *FILES}
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        made = client.get(path)
        assert made.status_code == 200 and made.content == (FOLDER / (Path(path).name or "index.html")).read_bytes()
        policy = dict(one.split(" ", 1) for one in made.headers["content-security-policy"].split("; "))
        assert policy.pop("media-src") == "'self' blob:" and policy.pop("img-src") == "'self' data: blob:"
        assert set(policy.values()) == {"'self'", "'none'"} and policy["default-src"] == "'none'"
        assert made.headers["x-content-type-options"] == "nosniff" and made.headers["referrer-policy"] == "no-referrer"
        assert made.headers["permissions-policy"].startswith("microphone=(self), camera=()")
        assert (
            made.headers["cross-origin-opener-policy"] == made.headers["cross-origin-resource-policy"] == "same-origin"
        )
    assert client.head("/").status_code == 200
    for path in (
        "index.html",
        "../app.py",
        "%2e%2e/app.py",
        "..%2fapp.py",
        "main.js/",
        "main.js%00",
        "MAIN.JS",
        "//etc",
    ):
        assert client.get(f"/page/{path}", follow_redirects=False).status_code in (307, 404)


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(client):
    page = Page(client.get("/").text)
    assert all(source.startswith(("/", "#")) and not source.startswith("//") for source in page.sources)
    assert all("src" in attributes for tag, attributes in page.attributes if tag == "script")
    assert "style" not in page.tags and len(page.ids) == len(set(page.ids))
    for tag, attributes in page.attributes:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")], tag
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'`\s]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|sessionStorage|eval\(", text
        )
        assert all(f"{used}.js" in FILES for used in re.findall(r'from "\./(\w+)\.js"', text))


def test_what_the_page_asks_needs_the_key(client):
    assert client.get("/page/access").json() == {"key": True}
    for path in ("/page/api/facts", "/page/api/examples/dog.ogg"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=AUTHORIZED).status_code == 200
    assert client.post("/page/api/attention", json={}).status_code == 401


def test_examples_are_there_with_their_sources(client):
    facts = client.get("/page/api/facts", headers=AUTHORIZED).json()
    assert [one["id"] for one in facts["models"]] == ["one", "two"]
    assert facts["models"][0]["integration"] == "pal" and facts["models"][0]["encoders"] == ["tiny"]
    assert [one["name"] for one in facts["examples"]] == examples.names() == ["dog.ogg", "scene.wav"]
    dog = client.get("/page/api/examples/dog.ogg", headers=AUTHORIZED)
    assert dog.content == shipped.RECORDING.read_bytes() and dog.headers["content-type"] == "audio/ogg"
    credits = shipped.RECORDING.with_name("recordings.md").read_text(encoding="utf-8")
    for said in ("pgonsilva", "CC BY", "freesound.org/people/pgonsilva/sounds/182395", "Karol J. Piczak"):
        assert said in credits.replace("\n", " ") and said in facts["examples"][0]["about"]
    scene = client.get("/page/api/examples/scene.wav", headers=AUTHORIZED).content
    samples_N, rate = soundfile.read(io.BytesIO(scene))
    assert len(samples_N) / rate == 4.0 and 0.05 < abs(samples_N).max() <= 1
    assert client.get("/page/api/examples/..%2fdemo.yaml", headers=AUTHORIZED).status_code == 404
    assert client.get("/page/api/examples/smol", headers=AUTHORIZED).json()["error"]["message"].startswith("no example")


def attention(client, **body):
    return client.post("/page/api/attention", json=body, headers=AUTHORIZED)


def test_attention_is_that_of_the_probe(client, model):
    audio = part(CLIPS[2])["input_audio"]
    given = {"model": "one", "question": ASK, "answer": "a loud siren"}
    made = attention(client, **given, input_audio=audio).json()
    expected = attention_by_word(model, model.index(wav(CLIPS[2])), ASK, "a loud siren")
    assert made["words"] == ["a", "loud", "siren"] and made["seconds"] == pytest.approx(expected.seconds)
    for row, other in zip(made["mass"], expected.mass_WX.tolist(), strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    indexed = client.post("/v1/audio/index", json={"model": "one", "input_audio": audio}, headers=AUTHORIZED).json()
    assert attention(client, **given, input_audio={"id": indexed["id"]}).json() == made
    for body, status in (
        ({**given, "answer": "", "input_audio": audio}, 400),
        ({**given, "question": "<audio>", "input_audio": audio}, 400),
        ({**given, "input_audio": {"id": "audio-0"}}, 404),
        ({**given, "answer": "a" * 2001, "input_audio": audio}, 422),
        ({**given, "model": "three", "input_audio": audio}, 404),
    ):
        made = attention(client, **body)
        assert made.status_code == status and made.json()["error"]["message"]


def test_without_a_probe_there_is_no_attention(model):
    with serving_page({"one": model}, ServeOptions(), attention=None) as (url, _):
        assert httpx.get(f"{url}/page/access").json() == {"key": False}
        assert httpx.get(f"{url}/page/api/facts").json()["attention"] is False
        body = {"model": "one", "input_audio": part(CLIPS[0])["input_audio"], "question": ASK, "answer": "yes"}
        assert httpx.post(f"{url}/page/api/attention", json=body).status_code == 404


def run(engine, function, clips=()):
    asked = Asked(engine, None)
    asked.request = EngineRequest(
        None, [clip_of(one) for one in clips], SamplingOptions(), lambda event: asked.events.put(event), function
    )
    engine.submit(asked.request)
    return asked


def test_functions_run_in_the_engine_s_thread_between_steps(served, model):
    _, engines = served
    engine = engines["two"]
    answer = ask(engine, ASK, CLIPS[:1], max_tokens=16)
    where = run(engine, lambda clips: (threading.current_thread().name, clips[0].tokens), CLIPS[1:2])
    event = where.events.get(timeout=60)
    assert event == Computed(("engine two", model.index((CLIPS[1], 16_000)).tokens))
    assert engine.stored(clip_of(CLIPS[1]).digest) is not None

    def fails(clips):
        raise PalError("not this one")

    failed = run(engine, fails)
    assert str(failed.events.get(timeout=60).error) == "not this one"
    assert answer.wait() == [alone(model, ASK, CLIPS[:1], 16)]


def test_without_a_browser_it_is_said_how_to_get_one(monkeypatch):
    monkeypatch.setattr("tests.browser.CHROMIUM", None)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"), browser():
        pass
