"""The words of every page for the page of search results, which a browser may not fetch from
disk."""

import json
from html import escape
from pathlib import Path

from docutils import nodes

FILE = "pages.js"
ANSWER = """
const fetched = window.fetch;
window.fetch = (address, ...options) => {
  const page = PAGES[String(address).replace(/^\\.\\//, "")];
  if (!page) return fetched(address, ...options);
  return Promise.resolve({ text: () => Promise.resolve(page) });
};
"""


def is_shown(node):
    """Whether a part of a section is prose: no cell of code, no section of its own."""
    return node.get("nb_element") != "cell_code" and not isinstance(
        node, (nodes.section, nodes.literal_block, nodes.comment)
    )


def blocks(section):
    """(id, text) of a section without those inside it, and of every term that it explains."""
    shown = [node for node in section.children if is_shown(node)]
    yield section["ids"][0], " ".join(" ".join(node.astext().split()) for node in shown)
    for item in section.findall(nodes.definition_list_item):
        term, meaning = item[0], item[-1]
        if term["ids"] and item.parent.parent.parent is section:
            yield term["ids"][0], f"{term.astext()}: {' '.join(meaning.astext().split())}"


def page(doctree):
    """What a search looks at of a page: its main part with texts under their ids."""
    parts = [
        f'<p id="{escape(id)}">{escape(text)}</p>'
        for section in doctree.findall(nodes.section)
        for id, text in blocks(section)
        if text
    ]
    return f'<div role="main">{"".join(parts)}</div>'


def write(app, exception):
    """Put the pages' words beside the other scripts, with an answer to the script that fetches a
    page to show some of them."""
    if exception or app.builder.format != "html":
        return
    pages = {
        app.builder.get_target_uri(name): page(app.env.get_doctree(name))
        for name in sorted(app.env.found_docs)
    }
    content = f"const PAGES = {json.dumps(pages, ensure_ascii=False)};\n{ANSWER}"
    Path(app.outdir, "_static", FILE).write_text(content, encoding="utf-8")


def load(app, pagename, templatename, context, doctree):
    """Only the page of results loads them."""
    if pagename == "search":
        app.add_js_file(FILE, loading_method="defer", priority=100)


def all_or_none(app, env, added, changed, removed):
    """All pages, where one has changed: what Sphinx puts into the index of the search, and what
    previews show of other pages, is lost for those that are not built again."""
    return sorted(env.found_docs) if added or changed or removed else []


def setup(app):
    app.connect("env-get-outdated", all_or_none)
    app.connect("html-page-context", load)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
