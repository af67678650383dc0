"""Imports go one way, and the core needs torch, numpy, safetensors, tqdm and greenlet only."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qpmerge_lite"
ORDER = ["errors", "moments", "bases", "programme", "cholesky", "solve", "climb", "held_out", "diagnostic",  # the mathematics
         "options", "memory", "experts", "merge", "calibration", "inputs", "forwards", "sparse", "datafree",  # weights and batches
         "sums", "views", "norms", "layers", "effects", "orders", "lockstep", "pauses", "layouts", "probes", "recording", "lookups", "survey",
         "rerun", "recipes", "reasons", "rows", "gather", "sequential", "solvers",  # the pass
         "assess", "heads", "gradient", "methods",
         "records", "manifests", "sources", "suites", "plots", "regression", "claims", "book", "cli"]  # fmt: skip
MATHEMATICS = ORDER[1 : ORDER.index("diagnostic") + 1]
CORE = ORDER[: ORDER.index("methods") + 1]
ALLOWED = {"torch", "numpy", "safetensors", "tqdm", "greenlet", "clarabel", "scipy"}
HEAVY = ["datasets", "transformers", "matplotlib", "seaborn", "sklearn", "PIL", "pandas", "papermill", "clarabel", "scipy"]


def layer(path):
    """The name in ORDER of a module of the package, folders counting as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(layer imported, or top-level name of another package; whether at module level) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = set(ast.walk(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])))
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == depth:  # relative to the package itself
                names = [node.module] if node.module else [alias.name for alias in node.names]
                known = [f"qpmerge_lite.{name}" if name.split(".")[0] in ORDER else "qpmerge_lite" for name in names]
                yield from ((name, node in at_top) for name in known)
            elif node.level:  # within a folder of the package
                yield f"qpmerge_lite.{layer(path)}", node in at_top
            else:
                yield node.module, node in at_top


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    own = ORDER.index(layer(path))  # a module that is not in ORDER has to be given its place
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "qpmerge_lite":
            other = parts[1] if len(parts) > 1 else "methods"
            assert ORDER.index(other) <= own, f"{path.name} imports {name}"
            assert other != layer(path) or path.parent != PACKAGE, f"{path.name} imports itself"


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_little(name):
    for imported, at_top in imports(PACKAGE / f"{name}.py"):
        package = imported.split(".")[0]
        if package not in sys.stdlib_module_names | {"qpmerge_lite"}:
            assert package in ALLOWED, f"{name}.py imports {package}"
            assert not (at_top and package in HEAVY), f"{name}.py imports {package} before it is needed"


def test_the_package_imports_only_its_core():
    code = f"import sys, qpmerge_lite; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)


def test_the_core_stays_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert sum(lines[PACKAGE / f"{name}.py"] for name in MATHEMATICS) <= 1500
    assert {path.name: count for path, count in lines.items() if count > 300} == {}


def test_functions_stay_short():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 40, f"{path.name}: {node.name} has {length} lines"
