"""Where the book is hosted, told to the build: what points to its repository and to itself.

``QPMERGE_REPOSITORY`` is the repository's address, ``QPMERGE_REF`` the branch or tag that is built,
``main`` by default, and ``QPMERGE_BOOK_URL`` the address of the pages. What hangs on an address is
not shown where the address is not known.
"""

import os
import re
from pathlib import Path

import yaml
from sphinx.errors import ConfigError
from sphinx.util.docutils import SphinxDirective

REPOSITORY = re.compile(r"https://github\.com/[A-Za-z0-9-]+/[A-Za-z0-9._-]+(?<!\.git)")
PAGES = re.compile(r"https?://[A-Za-z0-9.:-]+(?:/[A-Za-z0-9._~-]+)*")
REF = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
UNKNOWN = "ADDRESS_OF_THIS_REPOSITORY"  # what pages say in its place
UNPUBLISHED = "https://address-of-this-book"  # the same of the pages


def address(name, pattern, example):
    """The address, or part of one, that an environment variable names, without a slash at its end;
    empty where it is not set."""
    found = os.environ.get(name, "").strip().rstrip("/")
    if found and not pattern.fullmatch(found):
        raise ConfigError(f"{name}: expected an address like {example}, found {found!r}")
    return found


def configure(app, config):
    """Turn on the theme's buttons for a repository that is known, and pages' own addresses."""
    repository = address("QPMERGE_REPOSITORY", REPOSITORY, "https://github.com/OWNER/NAME")
    pages = address("QPMERGE_BOOK_URL", PAGES, "https://OWNER.github.io/NAME")
    config.qpmerge_repository, config.qpmerge_pages = repository, pages
    branch = address("QPMERGE_REF", REF, "main") or "main"
    if pages:
        config.html_baseurl = f"{pages}/"
        app.tags.add("published")
    if not repository:
        return
    app.tags.add("hosted")
    config.html_theme_options |= {
        "repository_url": repository,
        "repository_branch": branch,
        "path_to_docs": "book",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }


def name_repository(app, docname, source):
    """Commands and links of a page name repository and book, where they are known."""
    known = {UNKNOWN: app.config.qpmerge_repository, UNPUBLISHED: app.config.qpmerge_pages}
    for word, found in known.items():
        if found:
            source[0] = source[0].replace(word, found)


def point_at_sources(app, pagename, templatename, context, doctree):
    """A chapter's source is its notebook, not what the build executed; beside the buttons that open
    it stands how to begin there."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("url", "").startswith("https://"):
                button["url"] = button["url"].replace("/book/chapters/", "/notebooks/")
        if group.get("label") == "launch-buttons":
            url = context["pathto"]("elsewhere")
            group["buttons"].append(
                {
                    "type": "link",
                    "text": "How to begin there",
                    "url": url,
                    "icon": "fas fa-circle-info",
                }
            )


class Citation(SphinxDirective):
    """``{citation}``: BibTeX of the software and of the paper, from ``CITATION.cff``."""

    def run(self):
        source = Path(self.env.srcdir).parent / "CITATION.cff"
        self.env.note_dependency(str(source))
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        software = content | {"year": str(content["date-released"])[:4]}
        url = self.config.qpmerge_repository or self.config.qpmerge_pages
        if url:
            software["url"] = url
        entries = [entry(content["preferred-citation"]), entry(software)]
        return self.parse_text_to_nodes("```bibtex\n" + "\n\n".join(entries) + "\n```")


def entry(reference):
    """One reference of ``CITATION.cff`` as BibTeX."""
    people = [
        f"{person['family-names']}, {person['given-names']}"
        if "family-names" in person
        else f"{{{person['name']}}}"  # in braces, so that it is not taken for a person's
        for person in reference["authors"]
    ]
    fields = {"title": f"{{{reference['title']}}}", "author": " and ".join(people)}
    for key in ("year", "version", "doi", "url"):
        if key in reference:
            fields[key] = reference[key]
    kind, key = ("article", "paper") if reference["type"] == "article" else ("software", "software")
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{qpmerge-{key},\n{lines}}}"


def setup(app):
    app.add_config_value("qpmerge_repository", "", "env")
    app.add_config_value("qpmerge_pages", "", "env")
    app.add_directive("citation", Citation)
    app.connect("config-inited", configure, priority=400)  # before the theme reads its options
    app.connect("source-read", name_repository)
    app.connect("html-page-context", point_at_sources, priority=600)  # after the theme's own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
