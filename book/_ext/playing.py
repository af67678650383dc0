"""Figures to play with: the library that draws them comes from the installed package, pinned and
verified, and only pages that have such a figure load it."""

from importlib.resources import files
from pathlib import Path

import offline

SCRIPTS = {
    "bokeh.min.js": "532c29e9d071a023b60ca0fea169a1195e100cbd0eb85fe20ba1fc0587fefd48",
    "bokeh-widgets.min.js": "89027271317ca968005271c5fd702c9d8fcdf90a25b1461de17443d0bba47954",
}
CURE = (
    "install the version of requirements.lock, or after an upgrade write the new one into "
    "book/_ext/playing.py"
)
FIGURE = 'class="play"'  # as companion/book/interactive/embedding.py writes it


def packaged(name):
    """A script of the installed bokeh, as bytes."""
    return files("bokeh").joinpath("server", "static", "js", name).read_bytes()


def install_scripts(app, config):
    """Put the scripts where those of npm are."""
    folder = Path(app.srcdir) / offline.SCRIPTS / "bokeh"
    for name, expected in SCRIPTS.items():
        content = packaged(name)
        offline.verify(content, expected, f"{name} of bokeh", CURE)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    offline.copy_scripts(config)


def load_scripts(app, pagename, templatename, context, doctree):
    """Have the page at hand load the scripts, if it has a figure that they draw."""
    if FIGURE in context.get("body", ""):
        for name in SCRIPTS:
            app.add_js_file(f"bokeh/{name}", loading_method="defer")


def setup(app):
    app.connect("config-inited", install_scripts)
    app.connect("html-page-context", load_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
