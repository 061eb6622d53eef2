"""Headless Chromium for tests of pages, and what every page must keep to."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium")
BROWSER = (
    "needs Debian's chromium, and the test's packages: apt-get install chromium; "
    ".venv/bin/python -m pip install -c constraints.txt -e '.[web]'"
)
ARGS = [
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",  # and is always allowed
    "--no-sandbox",  # for root, as in containers
]
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
PAPER = {"width": 717, "height": 1046}
"""A4 within Chromium's margins, in CSS pixels."""


@contextmanager
def browser():
    """Headless Chromium; skips where it or Playwright is missing, and says how to get it."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(BROWSER)
    if CHROMIUM is None:
        pytest.skip(BROWSER)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            yield launched
        finally:
            launched.close()


def watched(tab, errors, requests):
    """Note errors of a tab's console and its requests in two lists."""
    tab.set_default_timeout(60_000)
    tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request))


def check_axe(tab):
    """axe-core finds nothing."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()


def check_width(tab):
    """Nothing makes the page wider than the screen."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
