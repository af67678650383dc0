"""Pages that need no network: scripts from npm are installed by the build, pinned and verified;
nothing else is fetched. The licences of all that the pages carry go with them."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging

logger = logging.getLogger(__name__)
SCRIPTS = "_scripts"  # a folder of the book's sources that the build fills


@dataclass(frozen=True)
class Package:
    """A package of npm, its hash, and which of its files a page loads: the first of ``parts`` is
    the script itself, all are kept under ``_scripts/<folder>``."""

    name: str
    sha256: str
    folder: str
    parts: tuple[str, ...]


MATHJAX = Package(
    "mathjax@3.2.2",
    "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
    "mathjax",
    ("es5/tex-svg.js", "es5/input/tex/extensions", "LICENSE"),
)
POPPER = Package(
    "@popperjs/core@2.11.8",
    "8e09bdfa912035668e62cea61321bce27cbd011b85672055db25d271bd63af49",
    "popper",
    ("dist/umd/popper.min.js", "LICENSE.md"),
)
TIPPY = Package(
    "tippy.js@6.3.7",
    "bf63cd2e158be2100078053f4c44f02ffec8fde7f30544270785d0f2eae02626",
    "tippy-bundle",
    ("dist/tippy-bundle.umd.min.js", "LICENSE"),
)
PACKAGES = (MATHJAX, POPPER, TIPPY)
# packages of Python whose files the pages carry, as THIRD_PARTY.md has them
CARRIED = ("bokeh", "sphinx", "pygments", "sphinx-book-theme", "pydata-sphinx-theme",
           "sphinx-design", "sphinx-togglebutton", "sphinx-copybutton", "sphinx-tippy",
           "myst-nb")  # fmt: skip


def install_scripts(app, config):
    """Tell MathJax and the previews where their scripts are: in this book, or where npm cannot give
    them at a CDN.

    They have a folder of their own, because Jupyter Book puts every script in ``_static`` on every
    page.
    """
    scripts = Path(app.srcdir) / SCRIPTS
    config.mathjax_path = address(MATHJAX, scripts)
    config.tippy_js = (address(POPPER, scripts), address(TIPPY, scripts))
    keep_licences(scripts / "licences")
    copy_scripts(config)


def keep_licences(folder):
    """Copy the licences of the packages of Python into a folder, one for each."""
    for name in CARRIED:
        own = distribution(name)
        for file in own.files or ():
            if file.name.startswith("LICENSE") and ".dist-info" in file.parts[0]:
                target = folder / name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(own.locate_file(file), target)


def copy_scripts(config):
    """Have the build copy the folder of scripts beside the pages, once."""
    if SCRIPTS not in config.html_static_path:
        config.html_static_path = [*config.html_static_path, SCRIPTS]


def verify(content, expected, name, cure):
    """Compare bytes with the SHA-256 that they should have.

    Raises: ExtensionError, with the cure.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ExtensionError(f"{name}: expected sha256 {expected}, found {found}; {cure}")


def address(package, scripts):
    """Path of a package's script from the folder of all, where it has been put if it was not there,
    or its URL at a CDN."""
    target, script = scripts / package.folder, package.parts[0]
    is_there = all((target / part).exists() for part in package.parts)
    if not is_there and not _install(package, target):
        logger.info(f"npm cannot give {package.name}: pages will load it and need a network")
        return f"https://cdn.jsdelivr.net/npm/{package.name}/{script}"
    return f"{package.folder}/{script}"


def _install(package, target):
    """Whether npm gave the package; then its parts are in the target."""
    with tempfile.TemporaryDirectory() as folder:
        archive = _pack(package, folder)
        if archive is None:
            return False
        verify(archive.read_bytes(), package.sha256, package.name, "do not use this file")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        fresh = target.with_name(f"{target.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        for part in package.parts:
            source, kept = Path(folder, "package", part), fresh / part
            kept.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, kept)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return True


def _pack(package, folder):
    npm = shutil.which("npm")
    if npm is None:
        return None
    done = subprocess.run(
        [npm, "pack", package.name, "--silent"], cwd=folder, capture_output=True, timeout=300
    )
    return next(Path(folder).glob("*.tgz"), None) if done.returncode == 0 else None


def load_what_is_asked_for(app, config):
    """Jupyter Book has every page load each script that lies anywhere under ``_static``, those of
    others too once they are installed. What a page loads is said where it is needed."""
    scripts = {}
    for entry in config.html_js_files:
        name = entry if isinstance(entry, str) else entry[0]
        if not isinstance(entry, str) or "/" not in name:
            scripts.setdefault(name, entry)  # the first says how
    config.html_js_files = list(scripts.values())


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
    app.connect("config-inited", install_scripts)
    app.connect("config-inited", load_what_is_asked_for)
    app.set_html_assets_policy("always")  # previews may hold formulae where a page has none
    return {"parallel_read_safe": True, "parallel_write_safe": True}
