"""Pages of reports in headless Chromium: on a phone, in the dark, on paper, by keyboard, and with their sound."""

from itertools import pairwise

import pytest

from tests.browser import PAPER, PHONE, WIDE, browser, check_axe, check_width, watched


@pytest.fixture(scope="module")
def chromium():
    with browser() as made:
        yield made


@pytest.fixture
def open_page(chromium):
    """Opens a file; fails on errors of the console, and on requests for anything beyond the file."""
    contexts, errors, requests = [], [], []

    def opened(path, size=WIDE, scheme="light"):
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        watched(tab, errors, requests)
        tab.goto(path.as_uri())
        return tab

    yield opened
    assert errors == []
    assert all(one.url.startswith(("file:", "data:")) for one in requests)
    for context in contexts:
        context.close()


def unfold(tab):
    tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


def luminance(tab, what="backgroundColor"):
    """0 for black to 1 for white, of the page's ground or ink."""
    return tab.evaluate(
        f"getComputedStyle(document.body).{what}.match(/\\d+/g).slice(0, 3).map(Number)"
        ".reduce((sum, value) => sum + value / 765, 0)"
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_is_wide_enough(open_page, report_page, scheme):
    tab = open_page(report_page, PHONE, scheme)
    assert (luminance(tab) > 0.9) == (scheme == "light") and (luminance(tab, "color") < 0.3) == (scheme == "light")
    check_width(tab)
    unfold(tab)
    check_width(tab)
    check_axe(tab)
    tab.set_viewport_size(WIDE)
    check_width(tab)


def test_on_paper_it_is_dark_on_white_open_and_not_cut(open_page, report_page):
    tab = open_page(report_page, PAPER, "dark")
    folded = tab.locator("details").count()
    assert tab.locator("details[open]").count() == 0
    data = tab.pdf(format="A4")
    assert data.startswith(b"%PDF") and data.count(b"/Type /Page\n") > 1
    assert tab.locator("details[open]").count() == folded
    tab.emulate_media(media="print")
    assert luminance(tab) == 1 and luminance(tab, "color") < 0.3
    assert not tab.locator("audio:visible").count() and not tab.locator(".cursor:visible").count()
    # what would scroll on a screen is whole on paper
    cut = tab.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
        ".map(one => one.tagName + ' ' + one.textContent.slice(0, 40))"
    )
    assert cut == []


def test_the_keyboard_scrolls_wide_tables(open_page, report_page):
    tab = open_page(report_page, PHONE)
    unfold(tab)
    wide = tab.locator(".scroll").evaluate_all("all => all.findIndex(one => one.scrollWidth > one.clientWidth)")
    assert wide >= 0
    table = tab.locator(".scroll").nth(wide)
    table.focus()
    assert table.evaluate("one => getComputedStyle(one).outlineStyle") != "none"
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("one => one.scrollLeft > 0", arg=table.element_handle())


def test_a_click_on_a_heat_map_moves_the_sound_and_its_line(open_page, joined_page):
    tab = open_page(joined_page)
    figure = tab.locator("figure[data-time]")
    sound, picture, line = figure.locator("audio"), figure.locator(".stage img"), figure.locator(".cursor")
    sound.evaluate("one => one.readyState || new Promise(done => { one.onloadedmetadata = done; one.load(); })")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.55, "y": box["height"] * 0.5})  # the middle of 0.2 to 0.9
    assert sound.evaluate("one => one.currentTime") == pytest.approx(0.25, abs=0.01)
    tab.wait_for_function(
        "line => line.style.left && Math.abs(parseFloat(line.style.left) - 55) < 2", arg=line.element_handle()
    )
    assert line.is_visible()


def test_headings_have_no_gaps_and_links_of_the_contents_lead_somewhere(open_page, report_page):
    tab = open_page(report_page)
    levels = tab.locator("h1, h2, h3, h4").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for link in tab.locator("nav a").all():
        target = link.get_attribute("href")
        assert target.startswith("#") and tab.locator(f"[id='{target[1:]}']").inner_text() == link.inner_text()
