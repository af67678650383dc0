"""Ideas for a better programme: the rules that they solve layers by, and the inputs they change."""

from types import SimpleNamespace

import pytest
import torch
from test_choice import CLASSES, TASKS, WIDTH, inputs
from torch import nn
from torch.func import functional_call
from toys import experts_of

import qpmerge_lite as q
from qpmerge_lite.choice.automatic import PRIOR, RIDGE
from qpmerge_lite.companion.experiments.unlabelled import ideas, layer_rules
from qpmerge_lite.diagnostic import RIDGES, cross_fitted
from qpmerge_lite.engine.recipes import Recipe
from qpmerge_lite.sequential import merge_together

torch.manual_seed(5)
BASE = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
EXPERTS = experts_of(BASE, tasks=TASKS)
LAYERS = {"0": WIDTH, "2": WIDTH}  # dense layers of the base and their outputs


def same(one, other):
    return all(torch.allclose(one[key], other[key], rtol=1e-9, atol=1e-11) for key in one)


def merged(solver):
    recipes = {"it": Recipe(solver, folds=1)}
    return merge_together(BASE, EXPERTS, inputs(32), recipes)["it"].state_dict


def test_outputs_that_all_weigh_the_same_change_nothing():
    slopes = {name: torch.ones(len(TASKS), m).double() for name, m in LAYERS.items()}
    weighted = merged(layer_rules.BySensitivity(slopes))
    assert same(weighted, merged(layer_rules.programme()))
    slopes = {name: 7 * weights for name, weights in slopes.items()}
    assert same(weighted, merged(layer_rules.BySensitivity(slopes)))


def test_every_output_is_solved_under_its_own_weights_of_the_tasks():
    found = q.layer_moments(BASE, EXPERTS, inputs(32), folds=1)["0"]
    weights = torch.rand(len(TASKS), WIDTH, generator=torch.Generator().manual_seed(3)).double()
    update, _ = layer_rules.BySensitivity({"0": weights})(found.moments, found.updates)
    moments, prior = found.moments, PRIOR * found.updates.double().sum(0)[0]
    for row in range(WIDTH):
        H = torch.zeros_like(moments.C[0, 0, 0])
        target = torch.zeros_like(moments.A[0, 0, 0, 0])
        for task in range(len(TASKS)):
            weight = weights[task, row] / moments.count[task, 0]
            H += weight * moments.C[task, 0, 0]
            target += weight * moments.A[task, 0, 0, row]
        penalty = RIDGE * torch.diag(H.diagonal())
        wanted = torch.linalg.solve(H + penalty, target + penalty @ prior[row])
        torch.testing.assert_close(update[0, row], wanted)


def test_slopes_are_the_fisher_information_of_what_a_layer_puts_out():
    many = inputs(4000, per_batch=1000)
    heads = {task: nn.Linear(WIDTH, CLASSES).double().requires_grad_(False) for task in TASKS}
    suite = SimpleNamespace(base=BASE, experts=EXPERTS, seed=0, classifiers=lambda: heads)
    slopes = layer_rules.sensitivities(suite, many)
    assert {name: tuple(w.shape) for name, w in slopes.items()} == {
        name: (len(TASKS), m) for name, m in LAYERS.items()
    }
    exact = torch.zeros(WIDTH).double()
    head = heads[TASKS[1]]
    for batch in many[TASKS[1]]:
        p = head(functional_call(BASE, EXPERTS[TASKS[1]], (), batch)).softmax(-1)
        for label in range(CLASSES):
            slope = head.weight[label] - p @ head.weight
            exact += (p[:, label, None] * slope.square()).sum(0).detach()
    torch.testing.assert_close(slopes["2"][1], exact / 4000, rtol=0.1, atol=0.0)
    means = {name: weights.mean(1) for name, weights in layer_rules.evened(slopes).items()}
    for mean in means.values():
        torch.testing.assert_close(mean, torch.ones_like(mean))


@pytest.mark.parametrize("basis", ["elements", "rows", "rotated_rows"])
def test_a_prior_is_chosen_with_its_ridge_by_what_is_captured_of_folds_held_out(basis):
    found = q.layer_moments(BASE, EXPERTS, inputs(32), folds=4)["0"]
    moments, updates = found.moments, found.updates
    _, row = layer_rules.FittedPrior(basis)(moments, updates)
    scores = {}
    for scale in layer_rules.PRIORS:
        options = {"prior": scale, "penalty": "diagonal"}
        ridge, score = cross_fitted(moments, updates, basis, RIDGES, **options)
        scores[scale, ridge] = float(score)
    best = max(scores, key=scores.__getitem__)
    assert (row["prior"], row["ridge"]) == pytest.approx(best)


def test_a_prior_of_some_layers_leaves_the_first_ones_before_them_alone():
    usual = merged(layer_rules.programme())
    other = merged(layer_rules.ByKind(("2",), 1.0))
    assert torch.equal(usual["0.weight"], other["0.weight"])
    assert not torch.allclose(usual["2.weight"], other["2.weight"])


def test_folds_are_clusters_of_what_the_base_makes_of_inputs():
    features = torch.nn.Linear(WIDTH, 1, bias=False).double()
    suite = SimpleNamespace(base=features)
    (batch,) = ideas.in_clusters(suite, inputs(32)["a"])
    along = features(batch["input"]).flatten()
    folds = [along[fold :: ideas.FOLDS] for fold in range(ideas.FOLDS)]
    if folds[0].mean() > folds[-1].mean():  # the sign of a component is nobody's choice
        folds.reverse()
    for low, high in zip(folds, folds[1:]):
        assert low.max() <= high.min()
    together = torch.cat([batch["input"] for batch in inputs(32)["a"]])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, batch["input"].tolist()))


def test_half_of_every_sequence_is_left():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    (batch,) = ideas.cut({"a": [{"input_ids": torch.ones_like(mask), "attention_mask": mask}]})["a"]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["input_ids"].shape == (2, 2)


def test_batches_of_other_lengths_are_padded_before_they_are_joined():
    joined = ideas.join([torch.ones(2, 3), torch.ones(1, 2)])
    assert joined.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert ideas.join([torch.ones(2, 3, 4), torch.ones(1, 3, 4)]).shape == (3, 3, 4)
