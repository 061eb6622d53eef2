"""The page in headless Chromium. Every test fails on a console error that it does not expect."""

import base64
import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stdout

import httpx
import pytest
import soundfile

from pal import shipped
from pal.serve.served import ServeOptions
from tests.browser import PHONE, WIDE, browser, check_axe, check_width, watched
from tests.models import tiny_model
from tests.serve.engines import CLIPS
from tests.serve.page_server import Opened, serving_page
from tests.serve.servers import KEY, says, user, wav

ASK = "What sound is this?"


@pytest.fixture(scope="module")
def chromium():
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def served(chromium):
    models = {"pal": tiny_model("pal"), "plits": tiny_model("plits")}
    with serving_page(models, ServeOptions(max_tokens=16, max_body=600_000)) as (url, engines):
        yield url, engines


@pytest.fixture
def open_page(chromium):
    contexts, tabs = [], []

    def opened(url, size=WIDE, scheme="light", **options):
        context = chromium.new_context(viewport=size, color_scheme=scheme, **options)
        contexts.append(context)
        page = Opened(context.new_page(), url, [], [], [])
        watched(page.tab, page.errors, page.requests)
        page.goto()
        tabs.append(page)
        return page

    yield opened
    for page in tabs:
        unexpected = [said for said in page.errors if not any(known in said for known in page.expected)]
        assert unexpected == []
        assert all(one.url.startswith((page.url, "blob:")) for one in page.requests)
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page, served):
    return open_page(served[0])


def answer_of(url, data, question, model="pal"):
    """What the server answers without the page."""
    clip = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    body = {"model": model, "messages": [user(clip, says(question))], "max_tokens": 16}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]


def test_an_uploaded_file_is_sent_as_it_is_and_answers_stream_in(page, served):
    url, _ = served
    data = wav(CLIPS[1], "FLAC")
    page.upload("tone.flac", data, "audio/flac")
    assert "0.70 s" in page.tab.inner_text("#clip-facts")
    hertz = int(re.search(r"near (\d+) hertz", page.drawn()).group(1))
    assert hertz == pytest.approx(440, rel=0.06)
    page.tab.evaluate(
        """() => { window.seen = [];
        const note = () => { const one = document.querySelector('.answer'); if (one) seen.push(one.textContent); };
        new MutationObserver(note).observe(document.getElementById('answers'), {subtree: true, childList: true}); }"""
    )
    page.tab.fill("#most", "16")
    first, second = page.ask(ASK)
    for card, model in ((first, "pal"), (second, "plits")):
        assert card.locator("h4").inner_text() == model
        assert card.locator(".answer").text_content() == answer_of(url, data, ASK, model)
        for said in ("audio", "indexed", "first token", "speed", "answer", "prompt"):
            assert card.locator(f"dt:text-is('{said}') + dd").inner_text()
    seen = list(dict.fromkeys(page.tab.evaluate("seen")))
    assert len(seen) > 3 and all(seen[-1].startswith(one) for one in seen)
    indexed = page.posted("/v1/audio/index")
    assert [one["model"] for one in indexed] == ["pal", "plits"]
    assert all(base64.b64decode(one["input_audio"]["data"]) == data for one in indexed)


def test_a_follow_up_uses_the_indexed_clip(page, served):
    _, engines = served
    page.tab.click("text=Example: A made-up scene")
    page.drawn()
    assert "Synthesised by pal" in page.tab.inner_text("#clip-about")
    assert page.tab.input_value("#question") == "What is the first sound?"
    page.tab.click("#ask")
    page.answers()
    encoded = [engine.stats.clip_misses for engine in engines.values()]
    kept = page.tab.inner_text("#indexed")
    assert re.search(r"pal: indexed once: \d+ audio tokens, [\d.]+ kB, [\d.]+ m?s; used for 1 question$", kept, re.M)
    first, _ = page.ask("And the last?")
    assert "earlier, in" in first.locator("dt:text-is('indexed') + dd").inner_text()
    assert page.tab.inner_text("#indexed") == kept.replace("1 question", "2 questions")
    assert [engine.stats.clip_misses for engine in engines.values()] == encoded
    assert len(page.posted("/v1/audio/index")) == 2 and len(page.posted("/v1/chat/completions")) == 4
    assert page.tab.locator(".asked h3").all_inner_texts() == ["And the last?", "What is the first sound?"]


class Large:
    """Takes the whole cache."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


def test_a_clip_that_left_the_cache_is_indexed_again(page, served):
    _, engines = served
    page.expected.append("404")
    page.tab.uncheck("input[value=plits]")
    page.upload("noise.wav", wav(CLIPS[0]))
    (before,) = page.ask(ASK, 1)
    engine = engines["pal"]
    engine.cache.put("large", Large(engine.cache.max_bytes))
    (after,) = page.ask(ASK, 1)
    assert "indexed again in" in after.inner_text()
    assert after.locator(".answer").text_content() == before.locator(".answer").text_content()
    assert len(page.posted("/v1/audio/index")) == 2


def test_a_recording_can_be_asked_about(page):
    page.tab.uncheck("input[value=plits]")
    page.tab.click("#record")
    page.tab.wait_for_selector(r"#record:text-matches('\\([1-9]')")  # a second or more
    assert page.tab.get_attribute("#record", "aria-pressed") == "true"
    page.tab.click("#record")
    page.tab.wait_for_selector("#clip-name:text-is('recording-1.wav')")
    page.drawn()
    assert page.tab.inner_text("#record") == "Record from the microphone"
    page.ask(ASK, 1)
    samples_N, _ = sound(page.posted("/v1/audio/index")[0])
    assert len(samples_N) > 16_000 and abs(samples_N).max() > 0.05  # the fake microphone beeps


def sound(request):
    return soundfile.read(io.BytesIO(base64.b64decode(request["input_audio"]["data"])))


def test_a_part_is_cut_out(page):
    page.tab.uncheck("input[value=plits]")
    page.upload("noise.wav", wav(CLIPS[2]))
    page.drawn()
    page.tab.fill("#from", "0.25")
    page.tab.fill("#to", "0.75")
    page.tab.press("#to", "Tab")
    page.ask(ASK, 1)
    samples_N, rate = sound(page.posted("/v1/audio/index")[0])
    assert rate == 16_000 and len(samples_N) == 8_000
    assert abs(samples_N - CLIPS[2][4_000:12_000].numpy()).max() < 1e-3
    assert "noise.wav, 0.25 to 0.75 s" in page.tab.inner_text(".asked")
    with page.tab.expect_download() as saved:
        page.tab.click("#save")
    assert saved.value.suggested_filename == "noise-0.25-0.75.wav"
    page.tab.locator("#stage").scroll_into_view_if_needed()
    box = page.tab.locator("#stage").bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 40, steps=3)
    page.tab.mouse.up()
    start, end = (float(page.tab.input_value(f"#{place}")) for place in ("from", "to"))
    assert (start, end) == (pytest.approx(0.22, abs=0.02), pytest.approx(0.55, abs=0.02))
    page.ask(ASK, 1)
    assert len(sound(page.posted("/v1/audio/index")[1])[0]) == pytest.approx((end - start) * 16_000, abs=200)
    page.tab.click("#whole")
    page.ask(ASK, 1)
    assert len(sound(page.posted("/v1/audio/index")[2])[0]) == len(CLIPS[2])
    page.tab.fill("#to", "0.1")
    page.tab.fill("#from", "0.5")
    page.tab.press("#from", "Tab")
    assert "before it begins" in page.shown("#region-error")
    page.tab.click("#ask")
    assert page.tab.evaluate("document.activeElement.id") == "from"
    assert len(page.posted("/v1/audio/index")) == 3


def test_a_finger_chooses_a_part(open_page, served):
    page = open_page(served[0], PHONE, has_touch=True)
    page.upload("noise.wav", wav(CLIPS[2]))
    page.drawn()
    page.tab.locator("#stage").scroll_into_view_if_needed()
    box = page.tab.locator("#stage").bounding_box()
    finger = page.tab.context.new_cdp_session(page.tab)
    for share, kind in ((0.3, "Start"), (0.4, "Move"), (0.5, "Move"), (0.6, "Move"), (None, "End")):
        points = [] if share is None else [{"x": box["x"] + share * box["width"], "y": box["y"] + 60}]
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    start, end = (float(page.tab.input_value(f"#{place}")) for place in ("from", "to"))
    assert (start, end) == (pytest.approx(0.33, abs=0.03), pytest.approx(0.66, abs=0.03))
    assert page.tab.is_visible("#save")


def test_the_end_of_a_clip_is_its_last_sample(page):
    page.tab.uncheck("input[value=plits]")
    data = wav(CLIPS[2][:16_070])  # 1.004 s, shown as 1.00
    page.upload("noise.wav", data)
    page.tab.fill("#from", "0.5")
    page.tab.press("#from", "Tab")
    assert page.tab.is_visible("#region") and page.tab.input_value("#to") == "1.00"
    page.ask(ASK, 1)
    assert len(sound(page.posted("/v1/audio/index")[0])[0]) == 8_070
    page.tab.fill("#from", "0")
    page.tab.press("#from", "Tab")
    assert not page.tab.is_visible("#region")
    page.ask(ASK, 1)
    assert base64.b64decode(page.posted("/v1/audio/index")[1]["input_audio"]["data"]) == data
    page.tab.fill("#to", "1.2")
    page.tab.press("#to", "Tab")
    assert "outside of the clip" in page.shown("#region-error")


def test_each_word_has_its_attention_over_the_spectrogram(open_page, served):
    url, _ = served
    page = open_page(url)
    page.tab.uncheck("input[value=plits]")
    page.tab.click("text=Example: A dog")
    page.drawn()
    (card,) = page.ask("Which comes first, the dog or the bell?", 1)
    with page.tab.expect_response("**/page/api/attention") as made:
        card.locator("text=Show where it listened").click()
    found = made.value.json()
    words = card.locator(".words button")
    words.first.wait_for()
    assert words.count() == len(found["words"])
    picture = card.locator("canvas")
    images = []
    for number, mass in enumerate(found["mass"][:2]):
        words.nth(number).click()
        assert words.nth(number).get_attribute("aria-pressed") == "true"
        assert card.locator(".words [aria-pressed=true]").count() == 1
        best = max(range(len(mass) - 5), key=lambda at: sum(mass[at : at + 6]))
        start = best * found["seconds"] / len(mass)
        label = picture.get_attribute("aria-label")
        assert f"attended most from {start:.2f}" in label and label.endswith(card.locator("canvas + p").inner_text())
        images.append(picture.evaluate("canvas => canvas.toDataURL()"))
    assert len(set(images)) == len(images)
    page.tab.fill("#from", "1.00")
    page.tab.press("#from", "Tab")
    (card,) = page.ask(ASK, 1)
    with page.tab.expect_response("**/page/api/attention") as made:
        card.locator("text=Show where it listened").click()
    found = made.value.json()
    card.locator(".words button").first.click()
    best = max(range(len(found["mass"][0]) - 5), key=lambda at: sum(found["mass"][0][at : at + 6]))
    start = 1.0 + best * found["seconds"] / len(found["mass"][0])  # in the clip, not in the part
    assert f"attended most from {start:.2f}" in card.locator("canvas").get_attribute("aria-label")


def test_errors_are_said_beside_what_caused_them(page):
    page.expected += ["400", "413", "ERR_FAILED"]
    page.tab.click("#ask")
    assert "choose a sound" in page.shown("#sound-error") and "write a question" in page.shown("#question-error")
    assert page.tab.evaluate("document.activeElement.id") == "file"
    page.upload("notes.txt", b"no sound at all", "text/plain")
    assert "cannot decode notes.txt" in page.tab.inner_text("#sound-status")
    page.ask(ASK)
    assert "notes" not in page.tab.inner_text(".asked .answer >> nth=0")
    assert page.shown("#sound-error") and page.tab.get_attribute("#file", "aria-invalid") == "true"
    page.tab.set_input_files("#file", {"name": "nothing.wav", "mimeType": "audio/wav", "buffer": b""})
    assert "nothing.wav is empty" in page.shown("#sound-error")
    page.upload("long.wav", wav(CLIPS[2].repeat(20)))
    page.ask(ASK)
    assert "choose a part of it" in page.shown("#sound-error")
    page.upload("noise.wav", wav(CLIPS[0]))
    page.ask("<audio>")
    assert "stands for a clip" in page.shown("#question-error")
    page.tab.fill("#most", "0")
    page.tab.click("#ask")
    assert "whole number" in page.shown("#most-error")
    page.tab.fill("#most", "8")
    page.tab.uncheck("input[value=pal]")
    page.tab.uncheck("input[value=plits]")
    page.tab.click("#ask")
    assert "at least one model" in page.shown("#models-error")
    page.tab.check("input[value=pal]")
    page.tab.route("**/v1/chat/completions", lambda route: route.abort())
    (card,) = page.ask(ASK, 1)
    assert "does not answer" in card.locator(".error").inner_text()
    assert page.tab.locator(".error:visible").count() == 1
    page.tab.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=""))
    (card,) = page.ask(ASK, 1)
    assert "the answer broke off" in card.locator(".error").inner_text()
    page.tab.unroute("**/v1/chat/completions")
    (card,) = page.ask(ASK, 1)
    assert card.locator(".answer").inner_text() and not card.locator(".error").is_visible()


def test_an_answer_can_be_stopped(page):
    page.upload("noise.wav", wav(CLIPS[0]))
    page.tab.route("**/v1/chat/completions", lambda route: None)  # waits for ever
    page.tab.fill("#question", ASK)
    page.tab.click("#ask")
    page.tab.wait_for_selector(".card p:text-is('reading the question')")
    assert page.tab.is_disabled("#ask")
    page.tab.click("#stop")
    page.tab.wait_for_selector(".card p:text-is('stopped')")
    page.tab.wait_for_selector(".card p:text-is('not asked')")
    assert page.tab.is_enabled("#ask") and page.tab.is_disabled("#stop")


def test_a_dropped_file_that_the_browser_cannot_decode_can_be_asked_about(page, served):
    url, _ = served
    page.tab.uncheck("input[value=plits]")
    page.tab.fill("#most", "16")
    data = wav(CLIPS[1], "AIFF")
    dropped = page.tab.evaluate_handle(
        """bytes => { const made = new DataTransfer();
        made.items.add(new File([new Uint8Array(bytes)], 'tone.aiff')); return made; }""",
        list(data),
    )
    page.tab.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    page.tab.wait_for_selector("#clip-name:text-is('tone.aiff')")
    assert "cannot decode tone.aiff" in page.tab.inner_text("#sound-status")
    assert not page.tab.is_visible("#stage") and not page.tab.is_visible("#from")
    (card,) = page.ask(ASK, 1)
    assert card.locator(".answer").text_content() == answer_of(url, data, ASK)
    card.locator("text=Show where it listened").click()
    card.locator(".words button").first.wait_for()


def test_a_key_is_asked_for_and_kept_in_memory_alone(open_page):
    with serving_page({"pal": tiny_model("pal")}, ServeOptions(api_key=KEY)) as (url, _):
        page = open_page(url)
        page.expected.append("401")
        page.tab.fill("#key", "wrong")
        page.tab.press("#key", "Enter")
        assert "missing or wrong" in page.shown("#key-error")
        page.tab.fill("#key", KEY)
        page.tab.press("#key", "Enter")
        page.tab.wait_for_selector("input[name=model]")
        assert not page.tab.is_visible("#key-section")
        page.tab.click("text=Example: A dog")
        page.drawn()
        page.ask(ASK, 1)
        for place in ("#curl", "#python"):
            assert "PAL_API_KEY" in page.tab.inner_text(place) and KEY not in page.tab.inner_text(place)
        assert page.tab.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.goto()
        assert page.tab.is_visible("#key-section")


def test_programs_ask_the_same(open_page, served, tmp_path, monkeypatch):
    url, _ = served
    page = open_page(url, permissions=["clipboard-read", "clipboard-write"])
    question = """What's "this" in $HOME, `ls` or \\n?"""
    data = wav(CLIPS[0])
    (tmp_path / "a dog's.wav").write_bytes(data)
    page.tab.set_input_files("#file", str(tmp_path / "a dog's.wav"))
    page.tab.wait_for_selector("#clip:visible")
    page.tab.fill("#most", "16")
    page.tab.fill("#question", question)
    expected = answer_of(url, data, question)
    monkeypatch.chdir(tmp_path)
    for indexed in (False, True):
        if indexed:
            page.ask(question)
        page.tab.click("button[data-of=python]")
        page.tab.wait_for_selector("#copied:text-is('Copied.')")
        program = page.tab.evaluate("navigator.clipboard.readText()")
        assert ("audio-" in program) is indexed and ("base64" in program) is not indexed
        said = io.StringIO()
        with redirect_stdout(said):
            exec(compile(program, "program", "exec"), {})
        assert said.getvalue() == f"{expected}\n"
        if shutil.which("curl"):
            command = page.tab.inner_text("#curl")
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
            assert streamed(done.stdout) == expected


def streamed(text):
    chunks = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:") and "[DONE]" not in line]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_the_keyboard_does_everything(page):
    reached = []
    while not reached or reached[-1] != "ask":
        page.tab.keyboard.press("Tab")
        name = page.tab.evaluate("document.activeElement.id || document.activeElement.textContent")
        reached.append(name)
        assert len(reached) < 30
        if name != "player":  # the browser's own buttons are focused there
            assert page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", name
        if name == "Example: A dog":
            page.tab.keyboard.press("Enter")
            page.drawn()
        elif name in ("from", "to"):
            page.tab.keyboard.press("Control+A")
            page.tab.keyboard.type({"from": "0.5", "to": "1.5"}[name])
    assert {"file", "record", "Example: A dog", "from", "to", "whole", "play", "save", "player", "question"} <= set(
        reached
    )
    page.tab.focus("#question")
    page.tab.keyboard.type(" Or not?")
    page.tab.keyboard.press("Enter")
    page.answers()
    assert page.tab.inner_text(".asked h3") == f"{ASK} Or not?"
    assert "0.50 to 1.50 s" in page.tab.inner_text(".asked")


def test_axe_finds_nothing_and_a_phone_is_wide_enough(open_page, served):
    page = open_page(served[0], PHONE, "light")
    page.expected.append("400")
    grounds = set()
    for step in range(3):
        if step == 1:
            page.tab.click("text=Example: A dog")
            page.drawn()
            (card, _) = page.ask("What is this? " + "word" * 60)
            card.locator("text=Show where it listened").click()
            card.locator(".words button").first.wait_for()
        elif step == 2:
            page.tab.set_viewport_size(WIDE)
            page.ask("<audio>")
            page.shown("#question-error")
        check_width(page.tab)
        for scheme in ("light", "dark"):
            page.tab.emulate_media(color_scheme=scheme)
            grounds.add(page.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            check_axe(page.tab)
    assert len(grounds) == 2


def test_the_shipped_recording_is_the_example(page):
    page.tab.uncheck("input[value=pal]")
    page.tab.click("text=Example: A dog")
    page.drawn()
    assert "CC BY 3.0" in page.tab.inner_text("#clip-about")
    page.tab.click("#ask")
    page.answers(1)
    (sent,) = page.posted("/v1/audio/index")
    assert base64.b64decode(sent["input_audio"]["data"]) == shipped.RECORDING.read_bytes()
