"""Pages that need no network: MathJax is installed by the build, pinned and verified; nothing else
is fetched."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging

PACKAGE = "mathjax@3.2.2"
SHA256 = "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09"
FALLBACK = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/es5/tex-svg.js"
# folders of _static with scripts that only pages load which need them
INSTALLED = ("mathjax/", "bokeh/")
logger = logging.getLogger(__name__)


def install_mathjax(app, config):
    """Put MathJax's SVG build and its TeX extensions under ``_static/mathjax``; without npm, point
    at the CDN and say so."""
    target = Path(app.srcdir) / "_static" / "mathjax"
    if (target / "tex-svg.js").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = _pack(folder)
        if archive is None:
            logger.info(
                f"npm cannot give {PACKAGE}: formulae will be read from a CDN and need a network"
            )
            config.mathjax_path = FALLBACK
            return
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise ExtensionError(
                f"{PACKAGE}: expected sha256 {SHA256}, found {found}; do not use this file"
            )
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        es5, fresh = Path(folder, "package", "es5"), target.with_name("mathjax.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(
            es5 / "input" / "tex" / "extensions", fresh / "input" / "tex" / "extensions"
        )
        shutil.copy(es5 / "tex-svg.js", fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def _pack(folder):
    npm = shutil.which("npm")
    if npm is None:
        return None
    done = subprocess.run(
        [npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, timeout=300
    )
    return next(Path(folder).glob("mathjax-*.tgz"), None) if done.returncode == 0 else None


def load_nothing_unasked(app, config):
    """Jupyter Book has every page load every script that an earlier build left under
    ``_static``."""
    config.html_js_files = [name for name in config.html_js_files if not name.startswith(INSTALLED)]


def disconnect_thebe(app):
    """Jupyter Book always loads sphinx-thebe, whose pages name a CDN even when the button is
    off."""
    for listeners in app.events.listeners.values():
        for listener in [item for item in listeners if item.handler.__module__ == "sphinx_thebe"]:
            app.disconnect(listener.id)
    styles = app.registry.css_files  # its style sheet would be asked for and not be there
    styles[:] = [(name, options) for name, options in styles if name != "sphinx-thebe.css"]


def setup(app):
    disconnect_thebe(app)
    app.connect("config-inited", install_mathjax)
    app.connect("config-inited", load_nothing_unasked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
