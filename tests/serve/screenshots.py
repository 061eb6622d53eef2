"""Pictures of the page for the documentation: `python -m tests.serve.screenshots`."""

import io
from pathlib import Path

from PIL import Image

import pal
from pal import shipped
from pal.serve.served import ServeOptions
from tests.browser import browser
from tests.serve.page_server import serving_page

OUT = Path(__file__).parent.parent.parent / "docs" / "serving"
PICTURES = {
    "page-light.png": ({"width": 1000, "height": 900}, "light", "Example: A dog", "Describe the sound."),
    "page-dark-phone.png": (
        {"width": 390, "height": 800},
        "dark",
        "Example: A made-up scene",
        "What is the last sound?",
    ),
}
"""Size, colours, example and the second question of each."""


def take(url, tab, example, question):
    """A picture of the page from its top to the end of the answers."""
    tab.goto(url)
    tab.click(f"text={example}")
    tab.wait_for_selector("#spectrum[aria-label*='most energy']")
    for number in range(2):
        if number:
            tab.fill("#question", question)
        tab.click("#ask")
        tab.wait_for_selector(f".asked >> nth={number}")
        tab.wait_for_selector("#ask:enabled", timeout=300_000)
    for button in tab.locator(".asked >> nth=0 >> .listened > button").all():
        button.click()
    tab.wait_for_selector(".asked >> nth=0 >> .listened:has(> button)", state="detached")
    tab.evaluate("document.activeElement.blur()")
    box = tab.locator("#answers").bounding_box()
    size = tab.viewport_size
    tab.set_viewport_size({**size, "height": round(box["y"] + tab.evaluate("scrollY") + box["height"]) + 30})
    tab.evaluate("scrollTo(0, 0)")
    return Image.open(io.BytesIO(tab.screenshot()))


def main():
    names = dict.fromkeys(("tiny", shipped.default()))
    OUT.mkdir(exist_ok=True)
    with serving_page({name: pal.load(name) for name in names}, ServeOptions()) as (url, _), browser() as chromium:
        for name, (size, scheme, example, question) in PICTURES.items():
            tab = chromium.new_context(viewport=size, color_scheme=scheme).new_page()
            picture = take(url, tab, example, question).convert("RGB").quantize(96)
            picture.save(OUT / name, optimize=True)
            print(f"{OUT / name}: {(OUT / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
