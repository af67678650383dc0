"""The small layers of the first chapters, and the figures drawn from them."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch
from drawn import drawn

from qpmerge_lite.bases import build
from qpmerge_lite.companion.book import figures
from qpmerge_lite.companion.experiments import synthetic
from qpmerge_lite.companion.suites import digits
from qpmerge_lite.diagnostic import captured_energy
from qpmerge_lite.errors import MergeError
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import minimise

matplotlib.use("agg")


@pytest.fixture(scope="module")
def layer():
    return digits.load(steps=20)


def test_a_drawn_layer_is_a_function_of_its_seed():
    first, again, other = (
        synthetic.draw(3, alignment=0.5, overlap=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert (
        torch.equal(first[1], again[1])
        and torch.equal(first[0].A, again[0].A)
        and not torch.equal(first[1], other[1])
    )


def test_more_samples_of_a_seed_leave_its_updates_alone():
    few, many = (
        synthetic.draw(2, alignment=0.3, overlap=0.5, seed=0, tokens=tokens)[1]
        for tokens in (8, 64)
    )
    assert torch.equal(few, many)


def test_targets_are_the_experts_outputs():
    moments, updates = synthetic.draw(2, alignment=0.3, overlap=0.5, seed=0)
    C, A, M = (z.sum(1)[:, 0] for z in (moments.C, moments.A, moments.M))
    torch.testing.assert_close(A, updates @ C)
    torch.testing.assert_close(M, updates @ C @ updates.mT)


@pytest.mark.parametrize("alignment", [0.0, 0.5, 1.0])
def test_a_rotation_is_orthogonal_and_full_alignment_is_none(alignment):
    Q = synthetic.rotation(12, alignment, torch.Generator().manual_seed(0))
    torch.testing.assert_close(Q @ Q.mT, torch.eye(12, dtype=Q.dtype))
    assert torch.equal(Q, torch.eye(12, dtype=Q.dtype)) == (alignment == 1)


def test_alignment_moves_the_energy_onto_the_diagonal():
    across, along = (
        synthetic.draw(3, alignment=a, overlap=0.5, seed=0)[0].pool() for a in (0.0, 1.0)
    )
    assert synthetic.off_diagonal(along) < 0.1 < 0.5 < synthetic.off_diagonal(across) < 1


def test_full_overlap_spends_one_set_of_directions():
    _, updates = synthetic.draw(4, alignment=0.0, overlap=1.0, seed=0)
    values = torch.linalg.svdvals(torch.cat(list(updates), 1))
    assert values[6] < 0.2 * values[5]


def test_too_many_directions_are_refused():
    with pytest.raises(
        MergeError, match="5 tasks of rank 6 with 0 shared directions need size ≥ 30, found 20"
    ):
        synthetic.draw(5, alignment=0.5, overlap=0.0, seed=0, size=20)


def test_all_top_rows_are_the_rows():
    moments, updates = synthetic.draw(3, alignment=0.4, overlap=0.5, seed=0)
    pooled = moments.pool()
    bases = synthetic.top_rows(updates, pooled, updates.shape[1]), build("rows", updates, pooled)
    top, rows = (captured_energy(programme(pooled, basis)) for basis in bases)
    assert top == pytest.approx(rows, abs=1e-9)


def test_a_comparison_holds_its_predictors_in_range():
    found = synthetic.compare(3, 0.2, 0.5, seed=0, keep=6, few=16)
    assert (
        0 <= found["reach"] <= found["promise"] <= found["off_diagonal"] < 1
        and 0 <= found["capture"] <= 1
    )
    assert found["truncated"] > found["full"]


def test_digits_moments_price_an_update_as_its_outputs_do(layer):
    pooled = layer.moments(folds=3).pool()
    for update in (layer.updates.mean(0), layer.updates.sum(0), torch.zeros_like(layer.W0)):
        assert float(layer.error(update)) == pytest.approx(pooled.loss(update[None]), rel=1e-9)


def test_digits_tasks_share_no_image_between_splits(layer):
    for task in layer.tasks:
        train, test = (
            {tuple(x.tolist()) for x in layer.data[task][split][0]} for split in ("train", "test")
        )
        assert not train & test
    assert (
        sum(len(labels) for splits in layer.data.values() for _, labels in splits.values()) == 1797
    )


def test_digits_experts_know_their_digits(layer):
    for k, task in enumerate(layer.tasks):
        X, labels = layer.data[task]["test"]
        logits = layer.heads[task](torch.relu(X @ (layer.W0 + layer.updates[k]).mT))
        assert float((logits.argmax(1) == labels).double().mean()) > 0.5


def test_digits_are_counted_over_all_tasks(layer):
    right = sum(
        int((layer.heads[task](torch.relu(X @ layer.W0.mT)).argmax(1) == labels).sum())
        for task in layer.tasks
        for X, labels in [layer.data[task]["test"]]
    )
    assert layer.correct(torch.zeros_like(layer.W0)) == right > 0


@pytest.mark.parametrize("tier", ["standard", "paper"])
def test_digits_have_no_larger_tier(tier):
    with pytest.raises(
        MergeError,
        match=f"suite digits: expected tier 'smoke', .* found '{tier}'; run this chapter with",
    ):
        digits.load(tier=tier)


def test_the_unrestricted_optimum_of_a_drawn_layer_is_regmean():
    moments, updates = synthetic.draw(3, alignment=0.5, overlap=0.5, seed=0, tokens=512)
    base = torch.randn(
        updates.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    grams = moments.C.sum(1)[:, 0] / moments.count.sum(1)[:, None, None]
    regmean = torch.linalg.solve(grams.sum(0), (grams @ (base + updates).mT).sum(0)).mT
    pooled = moments.pool()
    free = minimise(programme(pooled, build("elements", updates, pooled)))
    torch.testing.assert_close(base + free.d[0], regmean, rtol=1e-10, atol=1e-10)


def test_the_examples_of_the_readme_run():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    scope: dict = {"__name__": "readme"}
    exec(compile("\n".join(blocks), "README.md", "exec"), scope)
    assert (
        len(blocks) == 4
        and scope["merge"].state_dict.keys()
        == scope["base"].state_dict().keys()
        == scope["liked"].keys()
    )
    assert not scope["merged"].averaged
    assert all(
        found["gap"] > 0
        for found in scope["q"].certify(scope["layers"], scope["base"], scope["liked"]).values()
    )


def test_figures_fit_the_page_and_can_be_read():
    figures.style()
    for figure in drawn():
        figure.canvas.draw()
        assert figure.get_size_inches()[0] == figures.WIDTH
        words = [
            text
            for text in figure.findobj(matplotlib.text.Text)
            if text.get_text().strip() and text.get_visible()
        ]
        assert words and min(text.get_fontsize() for text in words) >= 9
        assert all(axis.get_legend() is None for axis in figure.axes)  # keys lie outside the data
