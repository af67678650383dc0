"""Shared by every test: a derandomised hypothesis profile, seeds, the devices present, and which
tests belong to the core and which to a built book."""

import ast
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from toys import TASKS, vision

settings.register_profile(
    "derandomised",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("derandomised")

# Shells start what they put in the background with Ctrl-C ignored, and so do its children: merges
# that tests stop by it would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)

THREADS = torch.get_num_threads()
ROOT = Path(__file__).parents[1]
PAGES = ROOT / "book" / "_build" / "html" / "intro.html"
# What tests of the core import: the packages it needs, those of its qp extra, those of tests.
CORE = {"qpmerge_lite", "torch", "numpy", "safetensors", "tqdm", "greenlet", "scipy", "clarabel"}
CORE |= {"pytest", "hypothesis", "packaging"}


def pytest_addoption(parser):
    parser.addoption(
        "--core", action="store_true", help="only tests that need neither companion nor extras"
    )


def pytest_ignore_collect(collection_path, config):
    """With ``--core``, leave out the modules that import the companion or what it needs."""
    if config.getoption("--core") and collection_path.name.startswith("test_"):
        return True if not belongs_to_core(collection_path) else None


def belongs_to_core(path):
    """Whether a test module imports the core and its packages only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(name.startswith("qpmerge_lite.companion") for name in names):
            return False
        outside = {name.partition(".")[0] for name in names} - CORE - sys.stdlib_module_names
        if node in tree.body and any(not (path.parent / f"{n}.py").exists() for n in outside):
            return False
    return True


def pytest_runtest_setup(item):
    """Tests of the built book are skipped where there is none, unless ``make test`` has just built
    it."""
    if item.get_closest_marker("book") and not PAGES.is_file():
        told = f"no pages in {PAGES.parent.relative_to(ROOT)}; run `make book` first"
        if os.environ.get("QPMERGE_BUILT"):
            pytest.fail(f"{told} (QPMERGE_BUILT says that it was run)", pytrace=False)
        pytest.skip(f"the book is not built: {told}")


@pytest.fixture(autouse=True)
def _same_start():
    """What a test before has set must not reach the next: benchmarks, for one, set the threads,
    and a merge that was begun with other threads is another order."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """Every device of this machine, one after the other."""
    return torch.device(request.param)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A toy suite of random images, with an empty cache."""
    datasets = pytest.importorskip(
        "datasets", reason="the suites extra is not installed on bare GPU hosts"
    )
    from qpmerge_lite.companion.suites import Suite

    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path))
    base, experts, _ = vision()
    draw = np.random.default_rng(0)
    rows = lambda n: datasets.Dataset.from_dict(
        {"pixels": draw.normal(size=(n, 8, 8)).tolist(), "label": draw.integers(0, 3, n).tolist()}
    )
    data = {
        t: datasets.DatasetDict(train=rows(24), validation=rows(30), test=rows(30)) for t in TASKS
    }
    collate = lambda columns: {
        "pixels": torch.as_tensor(np.asarray(columns["pixels"]))[:, None].double()
    }
    heads = {
        t: {
            "weight": torch.randn(3, 8, dtype=torch.float64),
            "bias": torch.zeros(3, dtype=torch.float64),
        }
        for t in TASKS
    }
    return Suite(
        "toy",
        "smoke",
        0,
        "cpu",
        list(TASKS),
        data,
        base,
        experts,
        heads,
        dict.fromkeys(TASKS, 3),
        collate,
    )
