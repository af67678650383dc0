"""Fresh heads on a merge's own features, and what is recorded of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from qpmerge_lite.companion.experiments import ablations, benchmark, chapter
from qpmerge_lite.companion.records import Records, load_records
from qpmerge_lite.companion.suites import probes


def clusters(count=200, classes=4, width=6):
    """Features (N, d) around well separated centres, and the classes (N,) of the centres."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(classes, width, generator=generator)
    labels = torch.arange(count) % classes
    return centres[labels] + 0.3 * torch.randn(count, width, generator=generator), labels


def head(classes=4, width=6):
    return {"weight": torch.zeros(classes, width), "bias": torch.zeros(classes)}


def accuracy(x, y, one):
    return float((linear(x, one["weight"], one["bias"]).argmax(1) == y).double().mean())


def test_a_weaker_ridge_fits_more_and_goes_further():
    x, y = clusters()
    found = probes.refits(x, y, head())
    losses = [float(cross_entropy(linear(x, h["weight"], h["bias"]), y)) for h in found]
    lengths = [float(h["weight"].norm()) for h in found]
    assert len(found) == len(probes.RIDGES) and list(probes.RIDGES) == sorted(probes.RIDGES)[::-1]
    assert losses == sorted(losses)[::-1] and lengths == sorted(lengths)
    assert accuracy(x, y, found[-1]) == 1.0


def test_a_refit_is_the_optimum_of_its_objective(monkeypatch):
    monkeypatch.setattr(probes, "ITERATIONS", 100)
    x, y = clusters()
    kept = {"weight": torch.randn(4, 6), "bias": torch.randn(4)}
    (found,) = probes.refits(x, y, kept, ridges=(1.0,))
    weight, bias = (found[name].clone().requires_grad_() for name in ("weight", "bias"))
    moved = (weight - kept["weight"]).square().sum()
    (cross_entropy(linear(x, weight, bias), y) + moved).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_features_that_were_turned_are_recovered_and_features_that_are_gone_are_not():
    """Loss in the head against loss in the representation."""
    x, y = clusters()
    kept = probes.refits(x, y, head())[-1]
    turned = x @ torch.linalg.qr(torch.randn(6, 6)).Q
    fresh = probes.refits(turned, y, kept)[-1]
    assert accuracy(turned, y, kept) < 0.7 and accuracy(turned, y, fresh) > 0.95
    gone = torch.ones_like(x)
    assert accuracy(gone, y, probes.refits(gone, y, kept)[-1]) <= 0.3


def test_the_kept_head_is_judged_as_everywhere(suite):
    found = probes.fresh_head(suite, suite.experts)
    for task in suite.tasks:
        expected = suite.evaluate(suite.experts[task], tasks=[task])[task]
        assert found[task]["kept"] == pytest.approx(expected)  # the toy's splits are all drawn


def test_an_expert_with_a_head_that_fits_gets_the_same_head_again(suite, monkeypatch):
    """Labels that the head gives itself: nothing is left to gain, so kept and fresh agree."""
    for task in suite.tasks:
        for split in ("train", "validation", "test"):
            inputs, _ = probes.drawn(suite, task, split)
            logits = suite.classifiers()[task](suite.base(**inputs))
            suite._cache["probed", task, split] = (inputs, logits.argmax(1))
        suite.heads[task] = {name: 50 * value for name, value in suite.heads[task].items()}
    found = probes.fresh_head(suite, dict.fromkeys(suite.tasks, suite.base.state_dict()))
    for values in found.values():
        assert values["kept"] == 1.0 and values["fresh"] == pytest.approx(1.0, abs=0.04)


def test_the_ridge_is_chosen_on_validation_and_is_one_for_all_tasks(suite):
    before = probes.fresh_head(suite, suite.experts)
    for task in suite.tasks:
        inputs, labels = probes.drawn(suite, task, "test")
        suite._cache["probed", task, "test"] = (inputs, (labels + 1) % 3)
    after = probes.fresh_head(suite, suite.experts)
    ridges = {values["ridge"] for found in (before, after) for values in found.values()}
    assert len(ridges) == 1 and ridges <= set(probes.RIDGES)
    assert before != after


def test_examples_are_drawn_once_and_are_few(suite, monkeypatch):
    monkeypatch.setattr(probes, "ROWS", {"train": 6, "validation": 4, "test": 5})
    inputs, labels = probes.drawn(suite, "a", "train")
    assert len(labels) == 6 and probes.drawn(suite, "a", "train")[1] is labels
    everything, of_all = suite.tensors("a", "train")
    rows = [
        int((everything["pixels"] == one).flatten(1).all(1).nonzero()) for one in inputs["pixels"]
    ]
    assert rows == sorted(set(rows)) and torch.equal(of_all[rows], labels)


def test_probes_are_kept(suite, monkeypatch):
    monkeypatch.setattr(benchmark, "result", lambda suite, method, size: {"options": {}})
    first = ablations.probed(suite, 4, ("base", "soup"))
    assert set(first) == {"experts", "base", "soup"} and set(first["soup"]) == set(suite.tasks)
    monkeypatch.setattr(ablations, "fresh_head", lambda *args: pytest.fail("made again"))
    assert ablations.probed(suite, 4, ("base", "soup")) == first


@pytest.mark.parametrize("seeds", [1, 2])
def test_fresh_and_kept_heads_are_recorded(tmp_path, seeds):
    rows = []
    for seed in range(seeds):
        accuracy = {"kept": {"a": 0.8, "b": 0.6}, "fresh": {"a": 0.9, "b": 0.7 + 0.1 * seed}}
        rows.append({"suite": "vision", "seed": seed, "method": "soup", "accuracy": accuracy})
    records = Records("06_vision", "smoke", root=tmp_path)
    shown = chapter.record_fresh_heads(records, "vision", rows)
    written = load_records("smoke", tmp_path)
    assert written["vision.fresh_head.examples"].value == probes.ROWS["train"]
    fresh = 0.8 + 0.025 * (seeds - 1)
    assert written["vision.fresh_head.soup"].value == pytest.approx(fresh)
    assert written["vision.fresh_head.soup.kept"].value == pytest.approx(0.7)
    assert written["vision.fresh_head.soup.gain"].value == pytest.approx(fresh - 0.7)
    assert written["vision.fresh_head.soup"].note.startswith(
        "over tasks" if seeds == 1 else "over seeds"
    )
    assert shown["uniform soup"]["fresh head"][0] == pytest.approx(fresh)
