"""What a run's tier stands for: a data tier, which suites are loaded at, and a size."""

import pytest

from qpmerge_lite.companion import suites
from qpmerge_lite.companion.plans import DATA_TIERS, EMBEDDED, PLANS, plan
from qpmerge_lite.errors import MergeError


def test_every_run_has_data_and_every_data_tier_has_suites_and_a_run():
    assert DATA_TIERS == ("smoke", "standard", "paper") and EMBEDDED in DATA_TIERS
    assert {tier for _, tier in suites.REGISTRY} == set(DATA_TIERS) <= PLANS.keys()
    assert all(plan(tier).data == tier for tier in DATA_TIERS)


def test_the_larger_run_is_of_the_embedded_suites_and_has_all_that_the_smaller_repeats():
    small, large = plan("smoke"), plan("full")
    assert large.data == small.data == EMBEDDED
    assert small.evidence == "full" and large.seeds > small.seeds
    assert set(large.subsets) > set(small.subsets)


def test_a_tier_without_a_plan_is_refused():
    with pytest.raises(MergeError, match="expected one of smoke, full, .*, found 'huge'"):
        plan("huge")


@pytest.mark.parametrize("name", ["vision", "language"])
def test_suites_take_the_tier_of_a_run(name):
    assert suites.task_names(name, "full") == suites.task_names(name, "smoke")
    assert not suites.is_public(name, "full")
    assert suites.single_layers(name, "full") == suites.single_layers(name, "smoke")
    with pytest.raises(
        MergeError, match=r"expected one of vision \(smoke\).*, found clip \(full\)"
    ):
        suites.task_names("clip", "full")


def test_runs_on_the_same_data_share_their_experts(monkeypatch):
    folders = []

    def expert(base, sha256, examples, classes, recipe, seed, task, folder, progress):
        folders.append(folder.name)
        return {}, {}

    monkeypatch.setattr(suites.training, "expert", expert)
    for tier in ("smoke", "full"):
        suite = suites.load("vision", tier, tasks=["greek"], progress=False)
        assert (suite.tier, suite.tasks) == ("smoke", ["greek"])
    assert folders == ["vision-smoke"] * 2
