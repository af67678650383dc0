"""What a result hangs on, by which `book/run` and `experiments/cache` decide what is stale: the
modules that its code imports, and those that they import in turn.

Sources are read, never imported, so this loads no torch. They are compared as Python's grammar sees
them: comments, docstrings and layout are no change. What counts as an import of a module:

* ``import`` and ``from`` statements anywhere in a file, but for those under ``if TYPE_CHECKING``;
* a string that is the dotted name of a module, as in a registry; a string with gaps, such as
  ``f"qpmerge_lite.companion.suites.{name}"``, stands for every module that fits;
* ``from package import name`` of a package that imports its names when they are used: the module
  that its ``TYPE_CHECKING`` block names. ``import package`` may use any of them.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PACKAGE = "qpmerge_lite"
ANY = "*"  # whatever a module has
GAP = re.compile(r"\{[^{}]*\}|%s")  # where a format string is filled in
MAGIC = re.compile(r"^\s*[%!?].*$", re.MULTILINE)  # lines of a cell that only IPython understands


@dataclass
class Source:
    """One file as far as staleness goes.

    Attributes:
        sha256: of its syntax tree, without docstrings.
        imports: (module, name taken from it or ``*``).
        named: regular expressions for modules whose names are strings in it.
        bound: names that its top level gives a value to.
        lazy: name -> module, of a package that imports its names when they are used.
    """

    sha256: str
    imports: set[tuple[str, str]] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    lazy: dict[str, str] = field(default_factory=dict)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package in a checkout."""
    paths = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def reached(
    root: Path,
    names: Iterable[str] = (),
    cells: Iterable[str] = (),
    registered: Collection[str] = (),
) -> set[str]:
    """Modules of the package that the named ones, and the code of a notebook's cells, import,
    directly or through others.

    Args:
        root: the checkout that the package lies in.
        registered: modules that a string alone does not bring in: those of a registry of which the
            result uses one, to be given among ``names``.
    """
    known = _sources(root)
    todo = [name for name in names if name in known]
    for cell in cells:
        try:
            source = _digested(MAGIC.sub("", cell), "", "")
        except SyntaxError:  # IPython may still make sense of it, and import what it likes
            return set(known)
        todo += _targets(source, known, registered)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += _targets(known[name], known, registered)
            todo += _among(known, name.rpartition(".")[0])
    return seen


def digest(root: Path, names: Iterable[str]) -> str:
    """SHA-256 of the sources of some modules, without comments, docstrings and layout."""
    known, total = _sources(root), hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{known[name].sha256}\0".encode())
    return total.hexdigest()


def _sources(root: Path) -> dict[str, Source]:
    """Every module of a checkout, as it is now."""
    return {
        name: _read(path.read_text(encoding="utf-8"), name, path.stem == "__init__")
        for name, path in modules(root).items()
    }


@lru_cache(maxsize=1024)
def _read(text: str, name: str, is_package: bool) -> Source:
    try:
        return _digested(text, name, name if is_package else name.rpartition(".")[0])
    except SyntaxError:  # whatever imports it fails and says so
        return Source(hashlib.sha256(text.encode()).hexdigest())


def _digested(text: str, name: str, package: str) -> Source:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    reader = _Reader(Source(hashlib.sha256(ast.dump(tree).encode()).hexdigest()), name, package)
    reader.read(tree)
    return reader.source


class _Reader(ast.NodeVisitor):
    """Collects what a syntax tree imports.

    Args:
        name, package: of the module, for relative imports.
    """

    def __init__(self, source: Source, name: str, package: str):
        self.source, self.name, self.package = source, name, package
        self.homes: dict[str, str] = {}  # of names that are imported for type checkers only

    def read(self, tree: ast.Module) -> None:
        self.source.bound = set(_bound(tree.body))
        lazy = "__getattr__" in self.source.bound
        self.visit(tree)
        if lazy:
            self.source.lazy = self.homes

    def visit_If(self, node: ast.If) -> None:
        """What is under ``if TYPE_CHECKING`` does not run."""
        if ast.unparse(node.test).rpartition(".")[2] != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        for statement in node.body:
            if isinstance(statement, ast.ImportFrom):
                self.homes |= {a.asname or a.name: self._whence(statement) for a in statement.names}
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """The ``__getattr__`` of a module imports by name, which is resolved where the name is
        used."""
        if node.name != "__getattr__" or len(node.args.args) != 1:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.source.imports.add((alias.name, ANY))
            if not alias.asname:  # binds the outermost package, and through it whatever that has
                self.source.imports.add((alias.name.partition(".")[0], ANY))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.source.imports |= {(self._whence(node), alias.name) for alias in node.names}

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._named([*GAP.split(node.value), *([""] if node.value.endswith(".") else [])])

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._named(self._parts(node))
        for piece in node.values:
            if isinstance(piece, ast.FormattedValue):
                self.visit(piece)

    def visit_Call(self, node: ast.Call) -> None:
        """``import_module`` may be given a relative name, or one that begins with a variable."""
        if ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            parts = self._parts(node.args[0]) if node.args else []
            if parts and parts[0].startswith("."):
                above = len(parts[0]) - len(parts[0].lstrip(".")) - 1
                anchor = self._anchor(node).split(".")
                start = ".".join(anchor[: len(anchor) - above])
                self._named([f"{start}.{parts[0].lstrip('.')}", *parts[1:]])
            elif len(parts) > 1 or parts == [PACKAGE]:
                self.source.named.add(".+".join(map(re.escape, parts)))
        self.generic_visit(node)

    def _anchor(self, node: ast.Call) -> str:
        """Package that a relative name given to ``import_module`` starts from."""
        given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "package")]
        return "".join(self._parts(given[0])) if given else self.package

    def _parts(self, node: ast.expr) -> list[str]:
        """A string as what is fixed of it, split where it is filled in; nothing where it is no
        string."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return GAP.split(node.value)
        if isinstance(node, ast.Name):
            known = {"__name__": self.name, "__package__": self.package}.get(node.id)
            return [] if known is None else [known]
        parts = [""]
        for piece in node.values if isinstance(node, ast.JoinedStr) else ():
            inner = piece.value if isinstance(piece, ast.FormattedValue) else piece
            first, *rest = self._parts(inner) or ["", ""]
            parts = [*parts[:-1], parts[-1] + first, *rest]
        return parts if isinstance(node, ast.JoinedStr) else []

    def _named(self, parts: list[str]) -> None:
        if parts and parts[0].startswith(f"{PACKAGE}."):
            self.source.named.add(".+".join(map(re.escape, parts)))

    def _whence(self, node: ast.ImportFrom) -> str:
        """Absolute name of the module that a ``from`` statement takes names from."""
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        start = parts[: len(parts) - node.level + 1]
        return ".".join([*start, *([node.module] if node.module else [])])


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements of a module's top level bind, under conditions too."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.If):
            told = ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
            yield from _bound(node.orelse if told else [*node.body, *node.orelse])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (a.asname or a.name.partition(".")[0] for a in node.names)
        else:
            yield from (
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )


def _among(known: Collection[str], name: str) -> list[str]:
    return [name] if name in known else []


def _targets(source: Source, known: dict[str, Source], registered: Collection[str]) -> set[str]:
    """Modules of the package that one source imports."""
    asked = set(source.imports)
    for pattern in source.named:
        asked |= {(n, ANY) for n in known if n not in registered and re.fullmatch(pattern, n)}
    return {target for module, name in asked for target in _resolved(module, name, known)}


def _resolved(module: str, name: str, known: dict[str, Source]) -> Iterator[str]:
    """Modules that are loaded when a name is taken from a module."""
    yield from _among(known, module)
    yield from _among(known, f"{module}.{name}")
    if module not in known:
        return
    package = known[module]
    if name in package.lazy:
        yield from _among(known, package.lazy[name])
    elif name == ANY or not (name in package.bound or f"{module}.{name}" in known):
        for home in package.lazy.values():
            yield from _among(known, home)
