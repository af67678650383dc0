"""The role ``{res}`` and the directives ``{questions}``, ``{tiers}`` and ``{published}``: measured
numbers reach a page only through records."""

import fnmatch
import os
import re
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective, SphinxRole

from qpmerge_lite.companion.book import claim_pages, claims, published
from qpmerge_lite.companion.experiments.benchmark import ENTRIES
from qpmerge_lite.companion.records import RecordError, find, load_records, read_json, record_files
from qpmerge_lite.errors import MergeError


def folder_of(env):
    """Where the records of the book that is built are."""
    return Path(env.srcdir) / "_records"


def read(env, tier):
    """Records of a tier, each page that reads them being rebuilt when they change."""
    root = folder_of(env)
    for path in record_files(tier, root):
        env.note_dependency(str(path))
    return load_records(tier, root)


def explain(record, tier):
    """One line for the tooltip: where a number comes from. The tier is the one it was read from,
    which for records of an earlier state is not the one it was run at."""
    parts = [record.id, record.unit, record.note, f"tier {tier}"]
    parts += [
        f"{name} = {value}"
        for name, value in (("n", record.n), ("seed", record.seed))
        if value is not None
    ]
    if record.interval:
        parts.append("interval [{:.4g}, {:.4g}]".format(*record.interval))
    return " · ".join(part for part in parts if part)


def called(id):
    """Part of a record's id in the words of the book: a method by the name that figures give it,
    and baseline where ids say neighbour."""
    if id in ENTRIES:
        return ENTRIES[id].label
    words = {"neighbour": "baseline", "qp": "programme", "multitask": "multi-task training"}
    return " ".join(words.get(word, word) for word in id.replace(".", ", ").split("_"))


class Result(SphinxRole):
    """``{res}`id` ``, ``{res}`id .3f ci` ``, ``{res}`standard:id pct` ``: a record of the built
    tier, or of the named one; see ``claims.format_record``."""

    def run(self):
        id, _, spec = re.sub(r"[|\s]+", " ", self.text.strip()).partition(" ")
        named, _, name = id.rpartition(":")
        tier = named or self.config.qpmerge_tier
        try:
            record = find(read(self.env, tier), name)
            text = claims.format_record(record, spec)
        except MergeError as error:
            raise ExtensionError(f"{self.env.docname}: {{res}}`{self.text}`: {error}") from error
        origin = explain(record, tier)
        return [nodes.abbreviation(self.rawtext, text, explanation=origin, classes=["record"])], []


class Questions(SphinxDirective):
    """``{questions}``: the file ``questions.yml``, whole."""

    def run(self):
        source = Path(self.env.srcdir) / "questions.yml"
        self.env.note_dependency(str(source))
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        return self.parse_text_to_nodes(claim_pages.questions(content))


class Tiers(SphinxDirective):
    """``{tiers} vision.*.accuracy``: the records that match, one row each, the built tier beside
    others.

    What another tier has not recorded is said to be so. Options: ``beside`` (tiers, default
    ``standard``) or ``before`` (tiers whose columns come first), and ``format`` as in ``{res}``.
    """

    required_arguments = 1
    option_spec = {"beside": str.split, "before": str.split, "format": str}

    def run(self):
        built = self.config.qpmerge_tier
        before = self.options.get("before", [])
        beside = self.options.get("beside", [] if before else ["standard"])
        found = dict.fromkeys([*before, built, *beside])  # columns in this order
        try:
            found[built] = self.matching(built)
        except MergeError as error:
            raise ExtensionError(
                f"{self.env.docname}: {{tiers}} {self.arguments[0]}: {error}"
            ) from error
        origins = []
        for tier in [*before, *beside]:
            try:
                found[tier], origin = self.matching(tier), self.origin(tier)
            except RecordError:
                found[tier], origin = {}, f"*{tier}*: not recorded"
            origins.append(origin)
        start, _, end = self.arguments[0].partition("*")
        ids = sorted(
            set().union(*found.values()),
            key=lambda id: -max(float(f[id].value) for f in found.values() if id in f),
        )
        rows = [
            [
                called(id.removeprefix(start).removesuffix(end)),
                *(self.cell(f.get(id)) for f in found.values()),
            ]
            for id in ids
        ]
        names = [tier.replace("-", ", as of ") for tier in found]
        lines = [["", *names], ["---"] * (len(names) + 1), *rows]
        return self.parse_text_to_nodes(
            "\n".join("| " + " | ".join(line) + " |" for line in lines)
            + f"\n\n{'; '.join(origins)}\n"
        )

    def matching(self, tier):
        """Records of a tier whose id fits the pattern."""
        return {
            id: r
            for id, r in read(self.env, tier).items()
            if fnmatch.fnmatchcase(id, self.arguments[0])
        }

    def cell(self, record):
        """A record as a cell of the table, without the interval that it lacks."""
        if record is None:
            return "not recorded"
        spec = self.options.get("format", ".3f ci")
        return claims.format_record(record, spec if record.interval else spec.replace("ci", ""))

    def origin(self, tier):
        """Device, date, versions and commit of the files that hold matching records."""
        said = []
        for path in record_files(tier, folder_of(self.env)):
            content = read_json(path)
            if fnmatch.filter(content["records"], self.arguments[0]):
                p = content["provenance"]
                said.append(
                    f"*{tier}*: {p['device']}, {p['date'][:10]}, torch {p['packages']['torch']}, "
                    f"commit {p['commit']}"
                )
        return "; ".join(said) or f"*{tier}*: not recorded"


class Published(SphinxDirective):
    """``{published} clip``: published figures of a family of checkpoints, beside the records of
    tier ``paper`` where there are any."""

    required_arguments = 1

    def run(self):
        source, family = Path(self.env.srcdir) / "published.yml", self.arguments[0]
        self.env.note_dependency(str(source))
        content = published.read(source)[family]
        try:
            records = read(self.env, "paper")
        except RecordError:
            records = {}
        run = any(id.startswith(f"{family}.") for id in records)
        said = (
            "Measured / published / difference."
            if run
            else "Published. **Not run on this build**; the command is "
            "`qpmerge book run --tier paper --only 09`."
        )
        return self.parse_text_to_nodes(
            f"{said} In per cent; source: "
            f"{content['source']}.\n\n{published.table(family, content, records)}\n"
        )


def setup(app):
    app.add_config_value("qpmerge_tier", os.environ.get("QPMERGE_TIER", "smoke"), "env")
    app.add_role("res", Result())
    app.add_directive("questions", Questions)
    app.add_directive("tiers", Tiers)
    app.add_directive("published", Published)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
