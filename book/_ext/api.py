"""The directive ``{public}``: every name of ``qpmerge_lite.__all__`` with its docstring.

``{public} moments bases`` documents the public names that these modules define, ``{public}``
without a module those that no other directive of the page has. Docstrings are plain text with
``double backticks``: their sections become field lists, and what reads as a formula is set as one.
"""

import ast
import inspect
import re

import formulas
from sphinx.util.docutils import SphinxDirective

import qpmerge_lite

SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Cost": "Cost",
}
HEADER = re.compile(rf"({'|'.join(SECTIONS)}):(?: (.*))?$")
ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)$")
ROLE = re.compile(r":(?:func|class|meth):`([\w.]+)`")


def public():
    """{name: last part of the module it is imported from} of all public names."""
    imported = {
        alias.name: node.module.rpartition(".")[2]
        for node in ast.walk(ast.parse(inspect.getsource(qpmerge_lite)))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    return {name: imported.get(name, "") for name in qpmerge_lite.__all__}


def line(name):
    """Where a public name stands in its module, for names in the order of the code."""
    value = getattr(qpmerge_lite, name)
    return inspect.findsource(value)[1] if callable(value) else 0


def plain(text):
    """RST in which bars and stars outside of backticks are bars and stars."""
    return re.sub(r"(``.+?``|`[^`]*`)|([|*])", lambda m: m[1] or f"\\{m[2]}", text, flags=re.DOTALL)


def sections(lines):
    """Docstring as [(heading or None, its lines)], a text beside the heading first."""
    parts = [(None, [])]
    for line in lines:
        match = HEADER.match(line)
        if match:
            parts.append((match[1], [match[2]] if match[2] else []))
        else:
            parts[-1][1].append(line)
    return parts


def entries(lines):
    """``name: text`` at the least indentation, what is indented more belonging to it, as
    [(name or None, text)]."""
    found = []
    least = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    for line in filter(str.strip, lines):
        own = len(line) - len(line.lstrip()) == least
        match = ENTRY.match(line.strip()) if own else None
        if match:
            found.append((match[1], match[2]))
        elif found and not (own and re.match(r"The others\b", line.strip())):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            found.append((None, line.strip()))
    return found


def field(heading, lines):
    """One section as a field of a field list."""
    if heading in ("Args", "Attributes"):
        items = [(f"**{name}** – {text}" if name else text) for name, text in entries(lines)]
        body = [line for item in items for line in (f"    * {item}", "")]
    else:
        body = [f"    {line.strip()}" for line in lines]
    return [f":{SECTIONS[heading]}:", *body, ""]


def reference(match, known):
    """A role whose target is on the page stays a link; a module's private name is code."""
    name = match[1].rpartition(".")[2]
    return match[0].replace(match[1], name) if name in known else f"``{match[1]}``"


def rewrite(app, what, name, obj, options, lines):
    """Listens to ``autodoc-process-docstring``: plain sections to field lists, formulae to math."""
    known = {*qpmerge_lite.__all__, *(dir(obj) if inspect.isclass(obj) else ())}
    owner = getattr(qpmerge_lite, name.split(".")[1], None) if name.count(".") > 1 else None
    known |= set(dir(owner)) if owner is not None else set()
    head, *rest = sections(plain("\n".join(lines)).split("\n"))
    text = [*head[1], "", *(line for part in rest for line in field(*part))]
    joined = ROLE.sub(lambda match: reference(match, known), "\n".join(text))
    lines[:] = formulas.typeset(joined).split("\n")


def readable(app, what, name, obj, options, signature, returned):
    """Listens to ``autodoc-process-signature``: a default that is made anew is no expression."""
    return signature and signature.replace("<factory>", "..."), returned


class Public(SphinxDirective):
    """``{public} module …``: public names that these modules define, or under a heading of their
    own those that are left."""

    optional_arguments, final_argument_whitespace = 1, True

    def run(self):
        owners, done = public(), self.env.temp_data.setdefault("public names", set())
        modules = self.arguments[0].split() if self.arguments else None
        chosen = [
            name
            for name, owner in owners.items()
            if name not in done and (modules is None or owner in modules)
        ]
        if modules is not None:
            chosen.sort(key=lambda name: (modules.index(owners[name]), line(name)))
        done.update(chosen)
        self.note_sources()
        text = "\n\n".join(map(self.document, chosen))
        heading = "" if modules else "```{rubric} Everything else\n```\n\n"
        fence = "```{eval-rst}\n.. currentmodule:: qpmerge_lite\n\n" + text + "\n```\n"
        return self.parse_text_to_nodes(heading + fence) if chosen else []

    def note_sources(self):
        """Has the page built again when a module of the package has changed."""
        for name in qpmerge_lite.__all__:
            owner = inspect.getmodule(getattr(qpmerge_lite, name))
            if owner:
                self.env.note_dependency(owner.__file__)

    def document(self, name):
        """What autodoc is told of a name: a class with its methods, a function, or a table of
        choices."""
        value = getattr(qpmerge_lite, name)
        if inspect.isclass(value):
            return f".. autoclass:: {name}\n   :members:"
        if callable(value):
            return f".. autofunction:: {name}"
        return f".. py:data:: {name}\n\n   One of {', '.join(f'``{key}``' for key in value)}."


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", readable)
    app.add_directive("public", Public)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
