"""The built book in a real browser: what a reader would stumble over. Run by `make browser`, which
installs what drives an installed Chromium."""

import os
from pathlib import Path

import browser as b
import pytest
import yaml

ROOT = Path(__file__).parents[1]
HTML = ROOT / "book" / "_build" / "html"
CONTENTS = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
ENTRIES = [entry["file"] for part in CONTENTS["parts"] for entry in part["chapters"]]
PAGES = [f"{entry}.html" for entry in (CONTENTS["root"], *ENTRIES, "genindex", "search")]
pytestmark = [
    pytest.mark.book,
    pytest.mark.skipif(
        not os.environ.get("QPMERGE_BROWSER"), reason="asks for a browser; run `make browser`"
    ),
]
every_page = pytest.mark.parametrize("name", PAGES)
EXCERPTS = """[...document.querySelectorAll('#search-results li')].slice(0, 4).every(
  found => found.innerText.toLowerCase().includes('captured energ'))"""
READY = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


@pytest.fixture(scope="module")
def origin():
    with b.served(HTML) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, b.launched(playwright) as browser:
        yield browser


@pytest.fixture(scope="module")
def visits(chromium, origin, tmp_path_factory):
    """A function that looks at a page, once."""
    rules, seen = b.axe(tmp_path_factory.mktemp("axe")), {}

    def look(name):
        if name not in seen:
            seen[name] = b.looked_at(chromium, origin, name, rules)
        return seen[name]

    return look


@every_page
def test_no_page_tells_the_console_of_an_error(visits, name):
    assert visits(name).said == []


@every_page
def test_no_page_asks_another_server_or_for_what_is_not_there(visits, name):
    visit = visits(name)
    assert (visit.elsewhere, visit.missing) == ([], [])


@every_page
def test_every_formula_is_drawn(visits, name):
    found = visits(name).mathematics
    assert (found["drawn"], found["errors"]) == (found["asked"], [])


def test_formulae_were_looked_for(visits):
    assert visits("notation.html").mathematics["drawn"] > 20


@every_page
def test_a_narrow_page_does_not_scroll_sideways(visits, name):
    assert visits(name).sideways == []


@every_page
@pytest.mark.parametrize("colours", list(b.SCHEMES))
def test_axe_finds_nothing_serious(visits, name, colours):
    assert visits(name).violations[colours] == []


def test_the_contents_beside_a_page_stay_in_the_window(chromium, origin):
    with b.opened(chromium, origin, width=1280) as (page, _):
        page.goto(f"{origin}/api.html#qpmerge_lite.minimise_constrained")
        page.wait_for_selector(".bd-sidebar-secondary .nav-link:visible code")
        over = "items => items.filter(item => item.getBoundingClientRect().right > 1280).length"
        assert page.locator(".bd-sidebar-secondary .nav-link").evaluate_all(over) == 0


def test_a_search_finds_pages(chromium, origin):
    """The word's definition first; every page with the words around it."""
    with b.opened(chromium, origin) as (page, visit):
        page.goto(f"{origin}/search.html?q=captured+energy")
        page.wait_for_selector("#search-results li a")
        page.wait_for_function(EXCERPTS)
        found = page.locator("#search-results li").all_inner_texts()
        page.locator("#search-results li > a").first.click()
        page.wait_for_selector("article")
    assert len(found) > 3 and found[0].startswith("Glossary") and visit.said == []


def test_the_first_page_can_be_used_within_two_seconds(chromium, origin):
    """From the request to the moment that its text and links are there; the best of three, as the
    machine may have other things to do."""
    took = []
    for _ in range(3):
        with b.opened(chromium, origin) as (page, _):
            page.goto(f"{origin}/intro.html", wait_until="domcontentloaded")
            assert page.locator("article a[href*='chapters/']").first.is_visible()
            took.append(page.evaluate(READY))
    assert min(took) < 2000


@every_page
def test_figures_to_play_with_answer_pointer_and_keyboard(chromium, origin, name):
    """Each is drawn, each of its sliders follows the arrow keys, and it answers a drag over it."""
    with b.opened(chromium, origin) as (page, visit):
        page.goto(f"{origin}/{name}", wait_until="networkidle")
        for figure in page.locator("article .play").all():
            figure.locator(".bk-Figure").first.wait_for()
            assert b.unmoved(page, figure) == []
            assert b.answers(page, figure)
        assert visit.said == []


@every_page
def test_no_figure_to_play_with_is_missed(name):
    """A page that loads what draws them has one, under the name by which they are looked for."""
    text = (HTML / name).read_text(encoding="utf-8")
    assert ("bokeh.min.js" in text) == ('class="play"' in text)
