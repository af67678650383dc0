"""Whose statement a paragraph is, marked the same way on every page.

A paragraph, or a part of one, that begins with **Paper**, **Review** or **Ours** is set by itself,
with a rule and the word at its beginning: ``**Paper** (abstract): text. **Ours:** more``.
"""

import re

from docutils import nodes
from sphinx.transforms import SphinxTransform

VOICE = re.compile(r"(Paper|Review|Ours)\b[.:,]?\s*(.*)", re.DOTALL)


def spoken(node):
    """The match of a node that may begin a voice, or None: strong text with the word at its
    start."""
    return VOICE.fullmatch(node.astext()) if isinstance(node, nodes.strong) else None


def begins(children, place):
    """Whether the child at a place begins a voice: the first one may, a later one only when it, or
    the text behind it, is punctuated as a beginning."""
    match = spoken(children[place])
    if match is None or not said(children[:place]):
        return match is not None
    after = children[place + 1].astext() if place + 1 < len(children) else ""
    return children[place].astext()[-1] in ".:" or after[:2] == " ("


def said(children):
    """The text of nodes that follow each other, which MyST begins with an empty one."""
    return "".join(child.astext() for child in children).strip()


def runs(paragraph):
    """The children of a paragraph, cut where a voice begins: what stands before may be empty."""
    cut = [place for place in range(len(paragraph)) if begins(paragraph.children, place)]
    ends = [*cut, len(paragraph)]
    return [paragraph[: ends[0]], *(paragraph[a:b] for a, b in zip(ends, ends[1:]))]


def marked(run):
    """A paragraph of one voice: its word, then the rest without the punctuation that joined them,
    beginning with a capital letter."""
    word, rest = spoken(run[0]).groups()
    name = word.lower()
    paragraph = nodes.paragraph(classes=["voice", f"voice-{name}"])
    paragraph += [nodes.inline("", word, classes=["voice-name"]), nodes.Text(" ")]
    behind = list(run[1:])
    if rest:
        paragraph += nodes.strong("", rest[0].upper() + rest[1:])
    elif behind and isinstance(behind[0], nodes.Text):
        text = re.sub(r"^[.:,]?\s+", "", behind.pop(0))
        paragraph += nodes.Text(text[:1].upper() + text[1:])
    paragraph += behind
    return paragraph


class Voices(SphinxTransform):
    """Every paragraph with voices in it becomes one of its own for each."""

    default_priority = 820  # behind MyST and citations, before the pages are kept

    def apply(self):
        for paragraph in list(self.document.findall(nodes.paragraph)):
            before, *voices = runs(paragraph)
            if voices:
                parts = [marked(run) for run in voices]
                if said(before):
                    parts.insert(0, nodes.paragraph("", "", *before))
                paragraph.replace_self(parts)


def setup(app):
    app.add_transform(Voices)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
