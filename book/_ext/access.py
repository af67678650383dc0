"""What others' templates leave to be said to those who read with a screen reader."""

import re

EMPTY_HEADER = re.compile(r"<th(?P<attributes>[^>]*)>(?:\s|&nbsp;|</?p>)*</th>")


def mended(html):
    """HTML whose corner cells without a word are no headers, whose list of references has items,
    and whose folded cells are called what they say."""
    html = EMPTY_HEADER.sub(r"<td\g<attributes>></td>", html)
    html = html.replace('role="doc-biblioentry"', 'role="listitem"')
    return html.replace('<summary aria-label="Toggle hidden content">', "<summary>")


def mend(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = mended(context["body"])


def setup(app):
    app.connect("html-page-context", mend, priority=400)  # before previews are taken
    return {"parallel_read_safe": True, "parallel_write_safe": True}
