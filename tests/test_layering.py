"""Imports go one way, and the core needs torch, numpy, safetensors, tqdm and greenlet only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qpmerge_lite"
MATHEMATICS = [
    "moments",
    "bases",
    "programme",
    "cholesky",
    "solve",
    "climb",
    "held_out",
    "diagnostic",
]
WEIGHTS = [
    "options",
    "aliases",
    "experts",
    "merge",
    "calibration",
    "inputs",
    "forwards",
    "sparse",
    "spectral.triplets",
    "datafree",
]  # and batches
ENGINE = [
    "products",
    "views",
    "norms",
    "layers",
    "effects",
    "orders",
    "processes",
    "lockstep",
    "pauses",
    "layouts",
    "probes",
    "recording",
    "lookups",
    "survey",
    "rerun",
    "recipes",
    "keeping",
    "reasons",
    "agreement",
    "rows",
    "reading",
    "sums",
    "gather",
]
METHODS = [
    "sequential",
    "solvers",
    "spectral.essential",
    "assess",
    "heads",
    "gradient",
    "methods",
]
METHODS += ["choice.criteria", "choice.automatic"]
CORE = ["errors", *MATHEMATICS, *WEIGHTS, *(f"engine.{name}" for name in ENGINE), *METHODS]
CHECKPOINTS = [
    "findings",
    "digests",
    "headers",
    "folders",
    "adapters.settings",
    "adapters.reading",
    "adapters.fitting",
    "deltas.reading",
    "comparison.fields",
    "calibration.records",
    "heads.tasks",
    "heads.adapted",
    "heads.naming",
    "heads.telling",
    "heads.card",
    "compatibility",
    "hub",
    "outlines",
    "calibration.data_sets",
    "fingerprints",
    "moments.files",
    "calibration.texts",
    "calibration.parquet",
    "calibration.pictures",
    "calibration.sources",
    "methods",
    "recipes.settings",
    "recipes.reading",
    "orders",
    "adapters.folding",
    "deltas.adding",
    "partial",
    "tensors",
    "large.mapped",
    "large.solved",
    "moments.grams",
    "architectures",
    "weights_only",
    "conversion.layout",
    "heads.running",
    "calibrated",
    "calibration.tokens",
    "calibration.feeds",
    "output",
    "heads.files",
    "recipes.plans",
    "planning",
    "manifests",
    "moments.measuring",
    "deltas.writing",
    "moments.solving",
    "recipes.arithmetic",
    "large.running",
    "large.estimates",
    "costs",
    "large.rates",
    "large.times",
    "large.measured",
    "large.budget",
    "large.heap",
    "merging",
    "diagnosis.certificates",
    "diagnosis.comparing",
    "diagnosis.diagnosing",
    "diagnosis.summary",
    "diagnosis.svg",
    "diagnosis.markup",
    "diagnosis.page",
    "evaluation.subjects",
    "evaluation.labels",
    "evaluation.scoring",
    "evaluation.evaluating",
    "evaluation.table",
    "stops",
    "processes.joining",
    "commands.words",
    "commands.merging",
    "commands.measuring",
    "commands.running",
    "manuals",
    "arguments",
    "completion.scripts",
]
CORE += [f"checkpoints.{name}" for name in CHECKPOINTS]
COMPANION = [
    "paths",
    "plans",
    "records",
    "staleness",
    "data",
    "suites",
    "experiments",
    "evidence",
    "book",
    "cli",
]  # folders count as one
FOLDERS = ("companion", "engine", "spectral", "choice", "checkpoints")
ORDER = [*CORE, *(f"companion.{name}" for name in COMPANION), "__main__"]
ALLOWED = {"torch", "numpy", "safetensors", "tqdm", "greenlet", "clarabel", "scipy"}
# what fetches checkpoints, builds their models and reads their inputs and recipes may be used by
# the modules that do so
BUILDERS = {"transformers", "huggingface_hub", "pyarrow", "PIL", "jinja2", "yaml", "shtab"}
HEAVY = [
    "datasets",
    "transformers",
    "matplotlib",
    "seaborn",
    "sklearn",
    "PIL",
    "pandas",
    "papermill",
    "clarabel",
    "scipy",
]


def place(name):
    """The entry of ORDER that a dotted module of the package belongs to, None for the package
    itself."""
    parts = name.split(".")
    if ".".join(parts[:3]) in ORDER:
        return ".".join(parts[:3])
    if parts[0] in FOLDERS and len(parts) > 1:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in ORDER else None


def dotted(path):
    """Path of a module of the package with dots."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """(dotted module of the package or name of another package, whether it is one of this package,
    whether at module level)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = set(
        ast.walk(
            ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        )
    )
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False, node in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, False, node in at_top
        elif isinstance(node, ast.ImportFrom):
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in start if part)
            for alias in node.names:
                inside = f"{base}.{alias.name}".strip(".")
                yield (
                    (
                        inside
                        if (PACKAGE / Path(*inside.split("."))).with_suffix(".py").exists()
                        else base
                    ),
                    True,
                    node in at_top,
                )


FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent.name in COMPANION
)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_one_way(path):
    own = place(dotted(path))
    assert own is not None, "a module that is not in ORDER has to be given its place"
    for name, inside, _ in imports(path):
        assert name.split(".")[0] != "qpmerge_lite", (
            f"{dotted(path)} imports {name} by its full name"
        )
        if inside:
            other = place(name) or "methods"  # the package itself gives what its core has
            assert ORDER.index(other) <= ORDER.index(own), f"{dotted(path)} imports {name}"
            assert own != "companion.cli" or name != "companion.cli"


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_little(name):
    for imported, inside, at_top in imports(PACKAGE / Path(*name.split(".")).with_suffix(".py")):
        package = imported.split(".")[0]
        if inside:
            assert package != "companion", f"{name} imports {imported}"
        elif package not in sys.stdlib_module_names:
            allowed = ALLOWED | BUILDERS if name.startswith("checkpoints.") else ALLOWED
            assert package in allowed, f"{name} imports {package}"
            assert not (at_top and package in HEAVY), (
                f"{name} imports {package} before it is needed"
            )


def test_the_package_imports_only_its_core():
    code = f"import sys, qpmerge_lite; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)


def statements(tree):
    """How many statements there are inside a syntax tree."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - isinstance(tree, ast.stmt)


def test_modules_and_functions_stay_small():
    """Statements are counted, not lines, so that nobody gains by crowding a line."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert statements(tree) <= 220, dotted(path)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert statements(node) <= 32, f"{dotted(path)}: {node.name}"


def test_folders_stay_small():
    for folder in {path.parent for path in FILES}:
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= 24, folder.name


def test_the_mathematics_stay_small():
    paths = [PACKAGE / f"{name}.py" for name in MATHEMATICS]
    assert sum(statements(ast.parse(path.read_text(encoding="utf-8"))) for path in paths) <= 900
