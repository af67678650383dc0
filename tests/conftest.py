"""Shared by every test: a derandomised hypothesis profile, seeds, and the devices present."""
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("derandomised", derandomize=True, deadline=None, max_examples=25, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("derandomised")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """Every device of this machine, one after the other."""
    return torch.device(request.param)
