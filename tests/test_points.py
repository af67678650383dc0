"""Methods as points of the programme, on a toy suite."""

import pytest

import qpmerge_lite as q
from qpmerge_lite.companion.experiments import benchmark, special_cases

SIZE = 8


def test_every_method_is_what_its_coefficients_say(suite):
    errors = special_cases.representation_errors(suite, SIZE)
    assert set(errors) == {
        "soup",
        "weighted_soup",
        "greedy_soup",
        "task_arithmetic",
        "model_stock",
        "ties",
        "dare",
        "fisher",
        "adamerging",
        "slerp",
        "regmean",
        "esm",
    }
    assert max(errors.values()) < 1e-6, (
        errors
    )  # AdaMerging's coefficients are float32, all else float64


@pytest.mark.parametrize("name", ["soup", "ties", "iso_c"])
def test_wider_bases_that_contain_a_method_capture_no_less(suite, name):
    found = special_cases.dominance(suite, SIZE, name)
    assert len(found) == 13 and (found.diff(axis=1).iloc[:, 1:] >= -1e-9).all(axis=None)


def test_shares_of_a_span(suite):
    """Task arithmetic is in every span, random entries in that of single entries only."""
    inside = special_cases.membership(suite, SIZE, "soup", "blocks.0.up")
    assert min(inside.values()) > 1 - 1e-9
    masked = special_cases.membership(suite, SIZE, "dare", "blocks.0.up")
    assert (
        masked["elements"] == pytest.approx(1)
        and masked["layer"] < masked["rows"] < 1
        and masked["layer"] <= masked["groups"] + 1e-12
    )


def test_certificates_are_those_of_the_merge(suite):
    found = special_cases.certificates(suite, "ties", SIZE)
    layers = q.layer_moments(
        suite.base,
        suite.experts,
        suite.calibration(SIZE),
        along=benchmark.chosen_merge(suite, "ties", SIZE).state_dict,
        folds=1,
    )
    assert found == pytest.approx(
        {
            k: c["gap"]
            for k, c in q.certify(
                layers, suite.base, benchmark.chosen_merge(suite, "ties", SIZE).state_dict
            ).items()
        }
    )


def test_a_path_runs_from_the_method_to_the_programme(suite):
    found = special_cases.path(suite, "ties", SIZE)
    energies = [p["calibration"] for p in found["points"]]
    assert energies == sorted(energies, reverse=True) and found["points"][-1]["ridge"] == "inf"
    method = benchmark.result(suite, "ties", SIZE)
    assert (
        found["chosen"]["method"]["test"] == method["normalised"]["mean"]
        and found["points"][-1]["validation"] == method["validation"]
    )
    lot = q.lot(suite.base, suite.experts, suite.calibration(SIZE)).state_dict
    optimum = [c["captured"] for c in q.certify(suite.layers(SIZE), suite.base, lot).values()]
    assert energies[0] == pytest.approx(sum(optimum) / len(optimum))
