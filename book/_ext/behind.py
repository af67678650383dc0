"""Under every figure of a chapter the table behind it: folded away, and whole as a CSV file."""

import csv
from pathlib import Path

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.osutil import relative_uri

from qpmerge_lite.companion.book.behind import DATA, PICTURES, SHADES

FOLDER = "_downloads/figures"
ROWS, COLUMNS = 120, 12  # a longer table is shown by its beginning
BEGINNING = 20


class Behind(nodes.General, nodes.Element):
    """A table with its ``head``, ``rows`` and how many there are in the file at ``uri``."""


class TablesBehind(SphinxPostTransform):
    """Reads the text that a figure has in its notebook, before only the image is kept of it."""

    default_priority = 3
    formats = ("html",)

    def run(self):
        number = 0
        for bundle in list(self.document.findall(is_bundle)):
            parts = {part["mime_type"]: part for part in bundle.children}
            said = parts["text/plain"].astext() if "text/plain" in parts else ""
            title, _, table = said.partition("\n")
            if "image/png" not in parts or title.rstrip() not in (DATA, SHADES, PICTURES):
                continue
            if title.rstrip() != DATA:
                for image in parts["image/png"].findall(nodes.image):
                    image["classes"].append("shades")
            if table:
                number += 1
                figure = bundle.parent if isinstance(bundle.parent, nodes.figure) else bundle
                place = figure.parent.index(figure) + 1
                figure.parent.insert(place, self.behind(table.strip(), number))

    def behind(self, table, number):
        """The node of a table, which is written as the page's figure of that number."""
        page = self.env.docname
        name = f"{FOLDER}/{page.rpartition('/')[2]}_{number}.csv"
        path = Path(self.app.outdir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table + "\n", encoding="utf-8")
        head, *rows = csv.reader(table.splitlines())
        uri = relative_uri(self.app.builder.get_target_uri(page), name)
        return Behind(head=head, rows=rows, uri=uri)


def is_bundle(node):
    """Whether a node holds the forms of one output, of which the page will show one."""
    return isinstance(node, nodes.container) and node.get("nb_element") == "mime_bundle"


def visit(self, node):
    rows, head = node["rows"], node["head"][:COLUMNS]
    shown = rows if len(rows) <= ROWS else rows[:BEGINNING]
    whole = len(shown) == len(rows) and len(head) == len(node["head"])
    size = f"{len(rows)} rows" if len(rows) != 1 else "1 row"
    part = "" if whole else f", of which {len(shown)} rows and {len(head)} columns are shown"
    cells = "".join(f'<th scope="col">{self.encode(name)}</th>' for name in head)
    lines = [f"<thead><tr>{cells}</tr></thead><tbody>"]
    for row in shown:
        cells = "".join(f"<td>{self.encode(cell)}</td>" for cell in row[:COLUMNS])
        lines.append(f"<tr>{cells}</tr>")
    self.body.append(
        f'<details class="behind"><summary>Data of this figure</summary><p>{size}{part}; '
        f'<a href="{node["uri"]}" download>whole as CSV</a>.</p>'
        f'<div class="pst-scrollable-table-container" tabindex="0"><table class="table">'
        f"{''.join(lines)}</tbody></table></div></details>\n"
    )
    raise nodes.SkipNode


def setup(app):
    app.add_node(Behind, html=(visit, None))
    app.add_post_transform(TablesBehind)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
