"""The directives ``{claims}`` and ``{claims-picture}`` and the role ``{verdict}``: what is claimed
and what came of it reaches a page only through ``claims.yml`` and records."""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from results import explain, read
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

from qpmerge_lite.companion.book import claim_pages, claim_picture, claims
from qpmerge_lite.errors import MergeError

VOICES = {"paper": "the paper", "review": "its review", "ours": "ours"}


def chosen(env, is_wanted):
    """The claims of ``claims.yml`` that are wanted. Raises: ExtensionError naming the page."""
    source = Path(env.srcdir) / "claims.yml"
    env.note_dependency(str(source))
    try:
        return [claim for claim in claims.load_claims(source) if is_wanted(claim)]
    except MergeError as error:
        raise ExtensionError(f"{env.docname}: claims: {error}") from error


def judged(env, is_wanted):
    """Their rows, by the records of the tier that is built or of their own."""

    def records(tier):
        return read(env, tier)

    try:
        return claims.judged(chosen(env, is_wanted), env.config.qpmerge_tier, records)
    except MergeError as error:
        raise ExtensionError(f"{env.docname}: claims: {error}") from error


def anchor(id):
    """Where the claim of an id stands on the claims page."""
    return nodes.make_id(f"claim-{id}")


def address(env, id):
    """The same as a link from the page that is read."""
    return f"{env.app.builder.get_relative_uri(env.docname, 'claims')}#{anchor(id)}"


class Verdict(SphinxRole):
    """``{verdict}`vision.multi_layer` ``: what came of a claim, in a word; of several claims every
    word once."""

    def run(self):
        ids = self.text.split()
        rows = {row.claim.id: row for row in judged(self.env, lambda claim: claim.id in ids)}
        missing = [id for id in ids if id not in rows]
        if missing:
            raise ExtensionError(
                f"{self.env.docname}: {{verdict}}`{self.text}`: claims.yml has no {missing[0]}"
            )
        said = []
        for verdict in dict.fromkeys(rows[id].verdict for id in ids):
            alike = [rows[id] for id in ids if rows[id].verdict == verdict]
            said += [nodes.Text(" and "), word(self.env, alike, [row.claim.rule for row in alike])]
        return said[1:], []


def word(env, rows, told, behind=""):
    """The verdict that some rows share, which leads to the first one's claim; what is told of it on
    hover, and a text behind the word."""
    verdict = rows[0].verdict
    classes = ["verdict", claim_picture.class_of(verdict)]
    shown = nodes.abbreviation("", verdict, explanation=" ".join(told), classes=classes)
    link = address(env, rows[0].claim.id)
    return nodes.reference("", "", shown, nodes.Text(behind), refuri=link, internal=True)


class Opening(SphinxTransform):
    """Under a chapter's answer stands what came of its claims: how many of every voice have which
    verdict, which leads to them."""

    default_priority = 815  # before voices are told apart
    ANSWER = "Answer in one sentence."

    def apply(self):
        folder, _, chapter = self.env.docname.partition("/")
        rows = judged(self.env, lambda claim: claim.chapter == chapter) if chapter else []
        if folder != "chapters" or not rows:
            return
        for paragraph in self.document.findall(nodes.paragraph):
            if paragraph.astext().startswith(self.ANSWER):
                place = paragraph.parent.index(paragraph) + 1
                paragraph.parent.insert(place, self.counted(rows))
                return

    def counted(self, rows):
        """The line: voices with their verdicts, each told by the statements that have it."""
        line = nodes.paragraph("", "", nodes.strong("", "Verdicts."), classes=["verdicts"])
        opening = " Claims of"
        for source, whose in VOICES.items():
            of_voice = [row for row in rows if row.claim.source == source]
            if of_voice:
                line += nodes.Text(f"{opening} {whose}: ")
                opening = ". Of"
            verdicts = [v for v in claims.VERDICTS if any(row.verdict == v for row in of_voice)]
            for place, verdict in enumerate(verdicts):
                alike = [row for row in of_voice if row.verdict == verdict]
                statements = [row.claim.statement for row in alike]
                line += nodes.Text(", " if place else "")
                line += word(self.env, alike, statements, f" {len(alike)}")
        line += nodes.Text(".")
        return line


class Picture(SphinxDirective):
    """``{claims-picture}``: the claims of the paper and of its review as one picture."""

    def run(self):
        rows = judged(self.env, lambda claim: claim.source != "ours")

        def link(id):
            return address(self.env, id)

        def origin(row, record):
            return explain(record, row.claim.tier or self.config.qpmerge_tier)

        return [nodes.raw("", claim_picture.picture(rows, link, origin), format="html")]


class Claims(SphinxDirective):
    """``{claims}``: every claim of ``claims.yml``, or those of a ``source``, a ``chapter`` or what
    they are ``about``, one by one with verdict, rule and measurement.

    Flags for less: ``short`` is a table of verdicts, which a reader can narrow down, ``counts`` how
    many there are of each, and ``rules`` what is asked, without any number.
    """

    option_spec = {
        **dict.fromkeys(("source", "chapter", "about"), str),
        **dict.fromkeys(("short", "counts", "rules"), directives.flag),
    }

    def run(self):
        if "rules" in self.options:
            asked = chosen(self.env, self.wanted)
            return self.parse_text_to_nodes(claim_pages.rules(asked))
        rows = judged(self.env, self.wanted)
        if "counts" in self.options:
            return self.parse_text_to_nodes(claim_pages.counts(rows))
        if "short" in self.options:
            return [self.filtered(rows)]
        return [self.block(row) for row in rows]

    def wanted(self, claim):
        """Whether a claim is of the source, chapter and part that the directive names."""
        named = {"source", "chapter", "about"} & self.options.keys()
        return all(getattr(claim, key) == self.options[key] for key in named)

    def link(self, chapter):
        """A link that MyST fills with the chapter's title."""
        return f"[](/chapters/{chapter})"

    def filtered(self, rows):
        """The table of verdicts, each linked to its claim's box, and the form that ``claims.js``
        narrows it down by: every line has the classes that a choice in the form names."""
        table, *rest = self.parse_text_to_nodes(claim_pages.short_table(rows, self.link))
        _, *lines = table.findall(nodes.row)
        for row, line in zip(rows, lines, strict=True):
            line["classes"] += [f"by-{row.claim.source}", claim_picture.class_of(row.verdict)]
            paragraph = line[1][0]
            link = nodes.reference("", "", *paragraph.children, refuri=f"#{anchor(row.claim.id)}")
            paragraph.children = []
            paragraph += link
        form = nodes.raw("", claim_picture.form(), format="html")
        return nodes.container("", form, table, *rest, classes=["claims-table"])

    def block(self, row):
        """One claim in a box of its own, which ``#claim-its-id`` points to."""
        text = claim_pages.block(row, self.config.qpmerge_tier, self.link)
        ids = [anchor(row.claim.id)]
        classes = ["claim", f"voice-{row.claim.source}"]
        return nodes.container("", *self.parse_text_to_nodes(text), ids=ids, classes=classes)


def setup(app):
    app.setup_extension("results")
    app.add_role("verdict", Verdict())
    app.add_directive("claims", Claims)
    app.add_directive("claims-picture", Picture)
    app.add_transform(Opening)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
