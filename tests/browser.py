"""What tests in a browser need: an installed Chromium, axe-core from npm, the pages on a local
server, and what a page says and asks for while it is looked at."""

import functools
import runpy
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qpmerge_lite.companion.book.pdf import chromium, rights

ROOT = Path(__file__).parents[1]
AXE, SHA256 = "axe-core@4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
SCHEMES = {"light": 1280, "dark": 375}  # colours -> width of the window in pixels
PATIENCE = 120_000  # milliseconds, for machines with other things to do
DRAWN = "[...document.querySelectorAll('.math')].every(m => m.querySelector('mjx-container'))"
MATHEMATICS = """() => ({
  asked: document.querySelectorAll('.math').length,
  drawn: document.querySelectorAll('.math mjx-container').length,
  errors: [...document.querySelectorAll('[data-mjx-error]')].map(e => e.dataset.mjxError),
})"""
SIDEWAYS = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = element => element && element !== document.body
    && (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(element).overflowX)
        || scrolls(element.parentElement));
  const wide = document.documentElement.scrollWidth <= width ? [] :
    [...document.body.querySelectorAll('*')].filter(
      e => e.getBoundingClientRect().right > width + 1 && !scrolls(e));
  return wide.map(e => `${e.tagName.toLowerCase()}.${e.className}`).slice(0, 5);
}"""
SERIOUS = """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
  .filter(found => ['serious', 'critical'].includes(found.impact))
  .flatMap(found => found.nodes.map(node => `${found.id}: ${node.target} ${node.html}`))"""


@dataclass
class Visit:
    """What was found on one page."""

    said: list[str] = field(default_factory=list)  # errors of the console, and of scripts
    elsewhere: list[str] = field(default_factory=list)  # requests that leave the server
    missing: list[str] = field(default_factory=list)  # requests that it could not answer
    mathematics: dict = field(default_factory=dict)
    sideways: list[str] = field(default_factory=list)  # what makes a narrow page scroll
    violations: dict[str, list[str]] = field(default_factory=dict)  # colours -> of axe's rules


def axe(folder):
    """The script of axe-core, which the book's own installer puts into a folder and verifies."""
    installer = runpy.run_path(str(ROOT / "book" / "_ext" / "offline.py"))
    package = installer["Package"](AXE, SHA256, "axe", ("axe.min.js",))
    return (Path(folder) / installer["address"](package, Path(folder))).read_text(encoding="utf-8")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *told):
        pass


@contextmanager
def served(folder):
    """Address of a server of a folder, for as long as it is needed."""
    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def launched(playwright):
    """Chromium as it is installed; Playwright downloads none."""
    browser = playwright.chromium.launch(executable_path=chromium(), args=rights())
    yield browser
    browser.close()


@contextmanager
def opened(browser, origin, colours="light", width=None):
    """A tab and the :class:`Visit` that it fills in."""
    visit = Visit()
    size = {"width": width or SCHEMES[colours], "height": 800}
    context = browser.new_context(color_scheme=colours, viewport=size)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("console", lambda m: visit.said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: visit.said.append(str(error)))
    page.on("request", lambda r: None if local(r.url, origin) else visit.elsewhere.append(r.url))
    page.on("response", lambda r: visit.missing.append(r.url) if r.status >= 400 else None)
    page.on("requestfailed", lambda request: visit.missing.append(request.url))
    yield page, visit
    context.close()


def local(url, origin):
    return url.startswith((f"{origin}/", "data:", "blob:", "about:"))


def looked_at(browser, origin, name, rules):
    """One page in light on a wide window and in dark on a narrow one: a :class:`Visit`."""
    found = Visit()
    for colours in SCHEMES:
        with opened(browser, origin, colours) as (page, visit):
            page.goto(f"{origin}/{name}", wait_until="networkidle")
            page.wait_for_function(DRAWN)
            found.mathematics = page.evaluate(MATHEMATICS)
            page.evaluate(rules)
            found.violations[colours] = page.evaluate(SERIOUS)
            if colours == "dark":
                found.sideways = page.evaluate(SIDEWAYS)
        found.said += visit.said
        found.elsewhere += visit.elsewhere
        found.missing += visit.missing
    return found


def unmoved(page, figure):
    """Sliders of a figure that no arrow key moves: one that stands at an end goes back."""
    still = []
    for handle in figure.locator(".noUi-handle").all():
        handle.scroll_into_view_if_needed()
        handle.focus()
        places = []
        for key in ("Shift", "ArrowRight", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)
            places.append(handle.bounding_box()["x"])
        if len(set(places)) == 1:
            still.append(handle.get_attribute("aria-valuetext"))
    return still


def answers(page, figure):
    """Whether something in a figure changes where the pointer is dragged over its first plot."""
    plot = figure.locator(".bk-Figure").first
    plot.scroll_into_view_if_needed()
    before, box = figure.screenshot(), plot.bounding_box()
    across, up = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(across, up)
    page.mouse.down()
    page.mouse.move(across + box["width"] / 6, up - box["height"] / 6, steps=5)
    page.wait_for_timeout(500)  # a drag is drawn at the next frame
    changed = figure.screenshot() != before
    page.mouse.up()
    return changed
