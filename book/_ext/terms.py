"""Where a page says a term of the glossary for the first time, the term is a link to it and so has
a preview.

Only terms of several words and names: a word such as *head* or *pass* is not always meant as the
glossary means it.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

PAGE = "glossary"
LISTED = re.compile(r"^```\{glossary\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSIDE = (nodes.reference, pending_xref, nodes.Titular, nodes.literal, nodes.caption)
INSIDE += (nodes.strong, nodes.abbreviation)


def terms(text):
    """Terms of the glossary's source that are linked wherever they are said, longest first."""
    lines = "\n".join(LISTED.findall(text)).splitlines()
    found = [line for line in lines if re.search(r"^[^ ].*[ -]|^[A-Z]+$", line)]
    return sorted(found, key=len, reverse=True)


class Terms(SphinxTransform):
    """Links the first time of each; longer terms come first, so that none is cut up."""

    default_priority = 830  # behind the voices

    def apply(self):
        source = Path(self.env.srcdir, f"{PAGE}.md")
        if self.env.docname == PAGE or not source.is_file():
            return
        self.env.note_dependency(str(source))
        for term in terms(source.read_text(encoding="utf-8")):
            word = re.escape(term).replace(r"\ ", r"\s+")
            form = re.compile(
                rf"(?<![\w-])(?:{word[0]}|{word[0].upper()}){word[1:]}s?(?![\w-])", re.DOTALL
            )
            self.link(term, form)

    def link(self, term, form):
        """Turn the first place of prose that matches into a link."""
        for text in self.document.findall(nodes.Text):
            match = form.search(text)
            if match and is_prose(text):
                before, said, after = text[: match.start()], match[0], text[match.end() :]
                target = {"refdomain": "std", "reftype": "term", "reftarget": term}
                shown = nodes.inline("", said, classes=["xref", "std", "std-term"])
                link = pending_xref(
                    "", shown, **target, refdoc=self.env.docname, refexplicit=True, refwarn=True
                )
                text.parent.replace(text, [nodes.Text(before), link, nodes.Text(after)])
                return


def is_prose(text):
    """Whether a text stands in a paragraph and in no link, heading, code or name."""
    node = text.parent
    in_paragraph = False
    while node is not None:
        if isinstance(node, INSIDE):
            return False
        in_paragraph = in_paragraph or isinstance(node, nodes.paragraph)
        node = node.parent
    return in_paragraph


def setup(app):
    app.add_transform(Terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
