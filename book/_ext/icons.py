"""The theme's script of icons, without those that no page shows: it brings two thousand, in a
megabyte and a half for every page."""

import re
from pathlib import Path

import pydata_sphinx_theme

SCRIPT = "_static/scripts/fontawesome.js"
WHOLE = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
# name:[width,height,[other names],"code",path or paths], one of an object's entries
ICON = re.compile(
    r'(?:"([a-z0-9-]+)"|([a-z0-9]+)):'
    r'\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?'
)
SHOWN = re.compile(r"\bfa-([a-z0-9-]+)")


def shown(folder):
    """Names of icons that pages and other scripts below a folder speak of."""
    files = [*folder.rglob("*.html"), *folder.rglob("*.js")]
    return {
        name
        for path in files
        if path != folder / SCRIPT
        for name in SHOWN.findall(path.read_text(encoding="utf-8", errors="replace"))
    }


def without_others(script, names):
    """The script with the icons of these names alone."""

    def kept(icon):
        others = re.findall(r'"([a-z0-9-]+)"', icon[3])
        return icon[0] if names & {icon[1] or icon[2], *others} else ""

    return ICON.sub(kept, script)


def shrink(app, error):
    """Write the smaller script into the pages that were built."""
    target = Path(app.outdir) / SCRIPT
    if error is None and app.builder.format == "html" and target.is_file():
        whole = (WHOLE / "scripts" / "fontawesome.js").read_text(encoding="utf-8")
        target.write_text(without_others(whole, shown(Path(app.outdir))), encoding="utf-8")


def setup(app):
    app.connect("build-finished", shrink)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
