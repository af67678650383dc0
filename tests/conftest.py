"""Shared by every test: a derandomised hypothesis profile, seeds, and the devices present."""

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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
