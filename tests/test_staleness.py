"""What is stale: chapters and kept merges, when a module that they import has changed, and only
then."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from qpmerge_lite import datafree, gradient, methods
from qpmerge_lite.companion import staleness, suites
from qpmerge_lite.companion.book import run
from qpmerge_lite.companion.experiments import benchmark, cache

ROOT = Path(__file__).parents[1]
SOLVE = "from qpmerge_lite.solve import minimise"
TREE = {
    "__init__": """
        '''A package that imports its names when they are used.'''
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from .methods import qp
            from .datafree import soup
        __version__ = "1"
        def __getattr__(name):
            from importlib import import_module
            return getattr(import_module(f".{name}", __name__), name)
    """,
    "solve": '''
        """Formulae."""
        def minimise(a, b):
            """Smallest first."""
            return a / b  # a formula
    ''',
    "methods": "from .solve import minimise\ndef qp(): return minimise(1, 2)",
    "datafree": "def soup(): return 0",
    "apart": "def late():\n    from . import solve\n    return solve",
    "told": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .solve import minimise",
    "companion/__init__": "",
    "companion/suites/__init__": """
        import importlib
        REGISTRY = {"vision": "qpmerge_lite.companion.suites.vision"}
        def load(name): return importlib.import_module(REGISTRY[name])
    """,
    "companion/suites/vision": "from ...datafree import soup\nfrom .training import RATE",
    "companion/suites/training": "RATE = 1",
    "companion/suites/unlisted": "",
    "companion/pretrain": """
        import importlib
        def main(name): return importlib.import_module(f"qpmerge_lite.companion.suites.{name}")
    """,
}  # fmt: skip


def write(root, name, text):
    """One module of the package in a checkout, from indented text."""
    import textwrap

    path = root / "qpmerge_lite" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def notebook(root, *cells, name="01_a"):
    """A notebook of these code cells in a checkout."""
    (root / "notebooks").mkdir(exist_ok=True)
    path = root / "notebooks" / f"{name}.ipynb"
    made = [{"cell_type": "code", "source": cell, "metadata": {}} for cell in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {}}))
    return path


@pytest.fixture
def checkout(tmp_path):
    for name, text in TREE.items():
        write(tmp_path, name, text)
    return tmp_path


def reached(root, *cells):
    """Short names of what code reaches."""
    found = staleness.reached(root, cells=cells)
    return {name.removeprefix("qpmerge_lite").lstrip(".") for name in found} - {""}


SAME = {
    "a comment": ("# a formula", "# another remark"),
    "a docstring": ("Smallest first.", "Largest last."),
    "a module's docstring": ('"""Formulae."""', ""),
    "layout": ("return a / b", "return (\n                a\n                / b\n            )"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_comments_docstrings_and_layout_remake_nothing(checkout, change):
    path = notebook(checkout, SOLVE)
    before = run.fingerprint(path, {})
    text = TREE["solve"].replace(*change)
    assert text != TREE["solve"]
    write(checkout, "solve", text)
    assert run.fingerprint(path, {}) == before


def test_a_caption_remakes_its_chapter(checkout):
    path = notebook(checkout, SOLVE)
    before = run.fingerprint(path, {})
    content = json.loads(path.read_text())
    content["cells"][0]["metadata"] = {"mystnb": {"figure": {"caption": "A curve that falls."}}}
    path.write_text(json.dumps(content))
    assert run.fingerprint(path, {}) != before


def test_a_script_beside_a_module_remakes_what_reaches_it(checkout):
    script = (checkout / staleness.PACKAGE / "solve").with_suffix(".js")
    own, other = (
        notebook(checkout, SOLVE, name="01_own"),
        notebook(checkout, "from qpmerge_lite.datafree import soup", name="02_other"),
    )
    marks = [(run.fingerprint(own, {}), run.fingerprint(other, {}))]
    for text in ("a / b", "a * b"):
        script.write_text(text)
        marks.append((run.fingerprint(own, {}), run.fingerprint(other, {})))
    assert [len(set(of_one)) for of_one in zip(*marks)] == [3, 1]


USES = {
    "the module": SOLVE,
    "a module that imports it": "from qpmerge_lite.methods import qp",
    "the package's name for that": "from qpmerge_lite import qp",
    "the whole package": "import qpmerge_lite",
    "the package as a module's parent": "import qpmerge_lite.datafree",
    "an import inside a function": "from qpmerge_lite import apart",
    "a string": "import importlib; importlib.import_module('qpmerge_lite.methods')",
    "a cell that only IPython understands": "files = !ls",
}
OTHERS = {
    "another module": "from qpmerge_lite.datafree import soup",
    "the package's name for another module": "from qpmerge_lite import soup",
    "the package's own version": "from qpmerge_lite import __version__",
    "another module under its own name": "import qpmerge_lite.datafree as free",
    "a suite": "from qpmerge_lite.companion.suites import load",
    "types only": "from qpmerge_lite import told",
    "magic": "%matplotlib inline\nimport torch",
}


@pytest.mark.parametrize("cell", [*USES.values(), *OTHERS.values()], ids=[*USES, *OTHERS])
def test_a_changed_formula_remakes_what_imports_it_and_nothing_else(checkout, cell):
    path = notebook(checkout, cell)
    before = run.fingerprint(path, {})
    write(checkout, "solve", TREE["solve"].replace("a / b", "a * b"))
    assert (run.fingerprint(path, {}) != before) == (cell in USES.values())


def test_a_registry_brings_in_what_it_lists(checkout):
    found = reached(checkout, "from qpmerge_lite.companion import suites")
    suite = {f"companion.suites.{name}" for name in ("vision", "training")}
    assert found == {"companion", "companion.suites", "datafree", *suite}


DYNAMIC = {
    "a name with a gap": "from qpmerge_lite.companion import pretrain",
    "a format": "import_module('qpmerge_lite.companion.suites.{}'.format(name))",
    "a sum": "import_module('qpmerge_lite.companion.suites.' + name)",
    "the old format": "import_module('qpmerge_lite.companion.suites.%s' % name)",
    "a variable in front": "import_module(f'{package}.suites.{name}')",
}


@pytest.mark.parametrize("cell", DYNAMIC.values(), ids=DYNAMIC)
def test_a_name_put_together_stands_for_every_module_that_fits(checkout, cell):
    assert {f"companion.suites.{name}" for name in ("vision", "training", "unlisted")} <= reached(
        checkout, cell
    )


def test_relative_names_start_from_their_package(checkout):
    write(
        checkout, "companion/a", "import importlib\nimportlib.import_module('..solve', __package__)"
    )
    write(
        checkout, "companion/b", "import importlib\nimportlib.import_module(f'.{x}', __package__)"
    )
    assert "solve" in reached(checkout, "from qpmerge_lite.companion import a")
    found = reached(checkout, "from qpmerge_lite.companion import b")
    assert {"companion.a", "companion.suites.vision"} <= found


def test_a_new_import_makes_a_module_part(checkout):
    path = notebook(checkout, "from qpmerge_lite import soup")
    change = partial(write, checkout, "solve")
    before = run.fingerprint(path, {})
    change("def minimise(a, b): return b")
    assert run.fingerprint(path, {}) == before
    write(checkout, "datafree", "from .solve import minimise\n" + TREE["datafree"])
    with_import = run.fingerprint(path, {})
    change("def minimise(a, b): return -b")
    assert len({before, with_import, run.fingerprint(path, {})}) == 3


def test_a_package_stands_for_the_code_of_its_init(checkout):
    path = notebook(checkout, "from qpmerge_lite.companion.suites import training")
    before = run.fingerprint(path, {})
    write(
        checkout, "companion/suites/__init__", TREE["companion/suites/__init__"] + "\n        A = 1"
    )
    assert run.fingerprint(path, {}) != before


def test_a_module_that_cannot_be_read_is_a_change(checkout):
    path = notebook(checkout, SOLVE)
    before = run.fingerprint(path, {})
    write(checkout, "solve", "def minimise(:")
    assert run.fingerprint(path, {}) != before


@pytest.fixture
def copy(tmp_path):
    """This package's own sources in a checkout of their own."""
    sources = ROOT / "qpmerge_lite"
    shutil.copytree(sources, tmp_path / "qpmerge_lite", ignore=lambda folder, names: [
        name for name in names if not (Path(folder, name).is_dir() or name.endswith(".py"))
    ])  # fmt: skip
    return tmp_path


def extend(root, name):
    path = root / "qpmerge_lite" / f"{name}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nEXTRA = 1\n", encoding="utf-8")


def chapters(root):
    """Chapter -> digest of what its notebook here reaches in a checkout."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[path.stem[:2]] = staleness.digest(root, staleness.reached(root, cells=code))
    return found


@pytest.mark.parametrize(("name", "some", "others"), [
    ("solve", {"01", "02", "03", "06", "12"}, set()),
    ("methods", {"03", "04", "06", "07", "09"}, {"01", "02"}),
    ("companion/experiments/special_cases", {"05"}, {"01", "06", "10", "13"}),
    ("companion/suites/clip", {"06", "09"}, {"13"}),
    ("companion/suites/digits", {"01", "02"}, {"06", "13"}),
    ("companion/cli", set(), {"01", "06", "13"}),
    ("companion/book/claims", set(), {"01", "06", "13"}),
])  # fmt: skip
def test_the_book_is_remade_where_it_has_to_be(copy, name, some, others):
    before = chapters(copy)
    extend(copy, name)
    after = chapters(copy)
    changed = {chapter for chapter in before if before[chapter] != after[chapter]}
    assert some <= changed and not others & changed


def made():
    """Stands for what an experiment computes."""


made.__module__ = benchmark.__name__


@pytest.mark.parametrize(("name", "vision_soup", "language_fisher", "any_method"), [
    ("datafree", True, False, True),
    ("gradient", False, True, True),
    ("moments", True, True, True),  # of energies, which every method is audited by
    ("solvers", False, False, True),
    ("companion/suites/training", True, True, True),
    ("companion/suites/vision", True, False, True),
    ("companion/suites/language", False, True, False),
    ("companion/experiments/benchmark", True, True, True),
    ("companion/experiments/special_cases", False, False, False),
    ("companion/experiments/timing", False, False, False),
])  # fmt: skip
def test_a_kept_merge_hangs_on_its_method_and_its_suite(
    copy, name, vision_soup, language_fisher, any_method
):
    suite = lambda name: SimpleNamespace(name=name, tier="smoke")
    now = lambda: [
        cache.sources(suite("vision"), made, datafree.soup, copy),
        cache.sources(suite("language"), made, gradient.fisher, copy),
        cache.sources(suite("vision"), made, None, copy),
    ]
    before = now()
    extend(copy, name)
    after = now()
    expected = [vision_soup, language_fisher, any_method]
    assert [a != b for a, b in zip(after, before)] == expected


def test_what_code_outside_the_package_makes_hangs_on_all_of_it(copy):
    toy = SimpleNamespace(name="toy", tier="smoke")
    before = cache.sources(toy, lambda: {}, root=copy)
    extend(copy, "companion/experiments/timing")
    assert cache.sources(toy, lambda: {}, root=copy) != before


def test_every_method_of_the_comparison_and_every_suite_has_a_module():
    files = staleness.modules(ROOT)
    assert {entry.call.__module__ for entry in benchmark.ENTRIES.values()} <= files.keys()
    assert set(suites.REGISTRY.values()) <= files.keys() and methods.__name__ in files
