"""The forward-order pass against slow readable re-computations on whole models."""

import copy

import pytest
import torch
from torch import nn
from toys import TASKS, experts_of, loaded, tokens, trace, vision

import qpmerge_lite as q
from qpmerge_lite.assess import Auditor
from qpmerge_lite.engine.layers import view
from qpmerge_lite.errors import EmptyCalibration, MergeError, MissingLayer, NonFinite, ShapeMismatch

FAMILIES = sorted(set(q.FAMILIES) - {"groups", "explicit"})
PROBLEMS = {"vision": vision, "tokens": tokens}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_energy_is_what_the_finished_model_shows(problem, family):
    """1 - L/E of every layer, measured by running base weights and the finished merge on their
    streams, equals the table."""
    base, experts, calibration = PROBLEMS[problem]()
    merge = q.qp(base, experts, calibration, basis=family, ridge=1e-3)
    merged = {t: trace(loaded(base, merge.state_dict), calibration[t]) for t in TASKS}
    own = {t: trace(loaded(base, experts[t]), calibration[t]) for t in TASKS}
    for row in merge.table:
        W0 = view(row["layer"], base.get_submodule(row["layer"])).matrix(base.state_dict())
        left = energy = 0.0
        for t in TASKS:
            X, Y_merged = merged[t][row["layer"]]
            Y = own[t][row["layer"]][1]
            left += float((Y - Y_merged).square().sum()) / len(X)
            energy += float((Y - torch.einsum("gmn,Ngn->Ngm", W0, X)).square().sum()) / len(X)
        assert row["captured"] == pytest.approx(1 - left / energy, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    "options",
    [
        {"inputs": "merged", "targets": "own"},
        {"inputs": "merged", "targets": "propagated"},
        {"inputs": "merged", "targets": 0.3},
        {"inputs": "expert"},
        {"inputs": "block"},
    ],
    ids=str,
)
def test_copies_of_one_expert_give_it_back(problem, options):
    base, experts, calibration = PROBLEMS[problem]()
    same = dict.fromkeys(TASKS, experts["a"])
    for family in FAMILIES:
        merge = q.qp(base, same, calibration, basis=family, ridge=0.0, **options)
        for name, value in experts["a"].items():
            torch.testing.assert_close(
                merge.state_dict[name], value, rtol=1e-9, atol=1e-9, msg=f"{family} {name}"
            )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_batching_does_not_matter(problem):
    base, experts, calibration = PROBLEMS[problem]()
    whole = {
        t: [{k: torch.cat([b[k] for b in batches]) for k in batches[0]}]
        for t, batches in calibration.items()
    }
    single = {
        t: [
            {k: v[i : i + 1] for k, v in b[0].items()}
            for i in range(len(next(iter(b[0].values()))))
        ]
        for t, b in whole.items()
    }
    merges = [q.qp(base, experts, c, basis="elements") for c in (calibration, whole, single)]
    for other in merges[1:]:
        for name, value in merges[0].state_dict.items():
            torch.testing.assert_close(other.state_dict[name], value, rtol=1e-8, atol=1e-8)


def test_order_of_experts_does_not_matter():
    base, experts, calibration = tokens()
    backwards = q.qp(
        base, {t: experts[t] for t in reversed(TASKS)}, calibration, basis="rows"
    ).state_dict
    for name, value in q.qp(base, experts, calibration, basis="rows").state_dict.items():
        torch.testing.assert_close(backwards[name], value, rtol=1e-9, atol=1e-10)


def test_padding_is_never_counted():
    base, experts, calibration = tokens()
    noise = {
        t: [
            {
                "input_ids": torch.where(
                    b["attention_mask"] == 1, b["input_ids"], 7 - b["input_ids"].clamp(max=7)
                ),
                "attention_mask": b["attention_mask"],
            }
            for b in batches
        ]
        for t, batches in calibration.items()
    }
    assert any(
        not torch.equal(x["input_ids"], y["input_ids"])
        for t in TASKS
        for x, y in zip(noise[t], calibration[t])
    )
    for name, value in q.qp(base, experts, calibration).state_dict.items():
        assert torch.equal(q.qp(base, experts, noise).state_dict[name], value)


@pytest.mark.parametrize(
    "options, streams",
    [({}, 2), ({"targets": "propagated"}, 1), ({"inputs": "expert"}, 1), ({"inputs": "block"}, 2)],
    ids=str,
)
def test_every_forward_runs_once_per_batch(options, streams):
    """Beside the survey, which looks at three sequences at a time, every batch has one forward of
    each stream that is needed."""
    base, experts, calibration = vision()
    sizes = []
    hook = base.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixels"])), with_kwargs=True
    )
    q.qp(base, experts, calibration, **options)
    hook.remove()
    assert sorted(n for n in sizes if n > 3) == sorted(len(TASKS) * streams * [4, 9])


def test_several_merges_of_one_pass_are_each_what_it_is_alone():
    base, experts, calibration = tokens()
    recipes = {
        "rows": q.Recipe(q.QP("rows")),
        "elements": q.Recipe(q.QP("elements"), targets="propagated"),
        "regmean": q.Recipe(q.RegMean(0.9), "expert", scope="weights", folds=1),
        "regmean, more": q.Recipe(q.RegMean(0.5), "expert", scope="weights", folds=1),
        "regmean++": q.Recipe(q.RegMean(0.9), "block", scope="weights", folds=1),
    }
    together = q.merge_together(base, experts, calibration, recipes)
    for name, recipe in recipes.items():
        alone = q.merge_together(base, experts, calibration, {name: recipe})[name]
        assert [r["layer"] for r in alone.table] == [r["layer"] for r in together[name].table]
        for key, value in alone.state_dict.items():
            assert torch.equal(together[name].state_dict[key], value), (name, key)


def test_regmean_is_the_programme_with_elements_propagated_targets_and_expert_inputs():
    base, experts, calibration = vision()
    programme = q.qp(
        base,
        experts,
        calibration,
        basis="elements",
        ridge=0.0,
        prior=0.0,
        inputs="expert",
        targets="propagated",
        scope="weights",
    )
    closed = q.regmean(base, experts, calibration, alpha=1.0)
    for row in programme.table:
        W = sum_of_grams(base, experts, calibration, row["layer"], 1.0)
        name = row["layer"] + ".weight"
        for merge in (programme, closed):
            X = torch.cat(
                [
                    trace(loaded(base, experts[t]), calibration[t])[row["layer"]][0][
                        :, 0, : -1 if base.get_submodule(row["layer"]).bias is not None else None
                    ]
                    for t in TASKS
                ]
            )
            difference = (merge.state_dict[name] - W) @ X.mT
            assert difference.norm() <= 1e-8 * (W @ X.mT).norm()


def sum_of_grams(base, experts, calibration, layer, alpha):
    """(Σ G_t)⁺ Σ G_t W_tᵀ, transposed: RegMean's closed form from whole-model traces, least-squares
    where singular."""
    total = weighted = 0
    for t in TASKS:
        X = trace(loaded(base, experts[t]), calibration[t])[layer][0][:, 0]
        X = X[:, :-1] if base.get_submodule(layer).bias is not None else X
        G = X.mT @ X / len(X)
        G = alpha * G + (1 - alpha) * torch.diag(G.diagonal())
        total, weighted = total + G, weighted + G @ experts[t][layer + ".weight"].mT
    return torch.linalg.lstsq(total, weighted, driver="gelsd").solution.mT


def test_regmean_with_shrunk_off_diagonals_to_1e_8():
    base, experts, calibration = vision()
    merge = q.regmean(base, experts, calibration, alpha=0.9)
    for row in merge.table:
        W = sum_of_grams(base, experts, calibration, row["layer"], 0.9)
        assert (merge.state_dict[row["layer"] + ".weight"] - W).norm() <= 1e-8 * W.norm()
    mean = sum(experts[t]["blocks.0.norm1.weight"] for t in TASKS) / 3
    torch.testing.assert_close(merge.state_dict["blocks.0.norm1.weight"], mean)


def test_regmean_plus_plus_runs_the_expert_block_on_merged_inputs():
    """Slow form: per block, run every expert's block on the hidden states of the blocks merged so
    far."""
    base, experts, calibration = tokens()
    merge = q.regmean_plus_plus(base, experts, calibration, alpha=0.9)
    merged = loaded(base, merge.state_dict)
    for index in range(len(base.blocks)):
        for layer in ("mix", "own"):
            total = weighted = 0
            for t in TASKS:
                hybrid = copy.deepcopy(merged)
                hybrid.blocks[index].load_state_dict(
                    {
                        k.removeprefix(f"blocks.{index}."): v
                        for k, v in experts[t].items()
                        if k.startswith(f"blocks.{index}.")
                    }
                )
                X = trace(hybrid, calibration[t])[f"blocks.{index}.{layer}"][0][:, 0, :8]
                G = X.mT @ X / len(X)
                G = 0.9 * G + 0.1 * torch.diag(G.diagonal())
                total, weighted = (
                    total + G,
                    weighted + G @ experts[t][f"blocks.{index}.{layer}.weight"].mT,
                )
            W = torch.linalg.solve(total, weighted).mT
            assert (
                merge.state_dict[f"blocks.{index}.{layer}.weight"] - W
            ).norm() <= 1e-8 * W.norm()


def test_rows_follow_the_forward_pass_and_everything_else_is_listed_as_averaged():
    base, experts, calibration = vision()
    merge = q.qp(base, experts, calibration, basis="layer")
    assert [r["layer"] for r in merge.table][:7] == [
        "embed",
        "blocks.0.norm1",
        *(f"blocks.0.attention.{x}" for x in ("query", "key", "value", "output")),
        "blocks.0.norm2",
    ]
    assert list(merge.averaged) == ["cls", "position"]
    for name in merge.averaged:
        torch.testing.assert_close(merge.state_dict[name], sum(experts[t][name] for t in TASKS) / 3)


def test_base_and_its_mode_are_left_alone_even_after_an_error():
    base, experts, calibration = vision()
    base.train()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    bad = {
        t: [{"pixels": torch.full((4, 1, 8, 8), float("nan"), dtype=torch.float64)}] for t in TASKS
    }
    with pytest.raises(
        NonFinite,
        match="layer embed, task a, inputs: .* NaN or infinite; check this task's calibration data",
    ):
        q.qp(base, experts, bad)
    q.qp(base, experts, calibration)
    assert base.training and all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in base.modules()
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_stays_near_float64(dtype, tolerance):
    base, experts, calibration = vision()
    exact = q.qp(base, experts, calibration, basis="layer", ridge=1e-2)
    low = q.qp(
        copy.deepcopy(base).to(dtype),
        {t: {k: v.to(dtype) for k, v in e.items()} for t, e in experts.items()},
        {t: [{k: v.to(dtype) for k, v in b.items()} for b in c] for t, c in calibration.items()},
        basis="layer",
        ridge=1e-2,
    )
    for a, b in zip(exact.table, low.table):
        assert b["captured"] == pytest.approx(a["captured"], rel=tolerance, abs=tolerance / 10)
    assert all(v.dtype == dtype for v in low.state_dict.values())


def test_runs_where_the_base_is(device):
    base, experts, calibration = vision()
    there = q.qp(copy.deepcopy(base).to(device), experts, calibration, basis="rows")
    assert all(v.device.type == torch.device(device).type for v in there.state_dict.values())
    for name, value in q.qp(base, experts, calibration, basis="rows").state_dict.items():
        torch.testing.assert_close(there.state_dict[name].cpu(), value, rtol=1e-8, atol=1e-8)


def test_choice_per_layer_has_the_highest_cross_fitted_energy():
    base, experts, calibration = tokens()
    first = lambda basis: q.qp(base, experts, calibration, basis=basis).table[0]
    chosen = first(["layer", "rows", "elements"])
    assert chosen["cross_fitted"] == max(
        first(b)["cross_fitted"] for b in ("layer", "rows", "elements")
    )


class Chain(nn.Module):
    """Blocks given by the test, with a hook for what a model may do around them."""

    def __init__(self, *blocks, between=nn.Identity):
        super().__init__()
        self.blocks, self.between = (
            nn.ModuleList(blocks),
            nn.ModuleDict({str(i): between() for i in range(len(blocks))}),
        )

    def forward(self, inputs):
        for i, block in enumerate(self.blocks):
            inputs = self.between[str(i)](block(inputs))
        return inputs


def chain(*blocks, **options):
    """A chain in float64 with experts and calibration."""
    torch.manual_seed(0)
    base = Chain(*blocks, **options).double()
    return (
        base,
        experts_of(base),
        {t: [{"inputs": torch.randn(24, 4, dtype=torch.float64)}] for t in TASKS},
    )


def test_a_block_may_itself_be_a_layer():
    base, experts, calibration = chain(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.LayerNorm(4)
    )
    merge = q.qp(base, experts, calibration, basis="elements")
    assert [r["layer"] for r in merge.table] == [
        "blocks.0",
        "blocks.1.0",
        "blocks.2",
    ] and not merge.averaged


def test_what_a_model_does_between_its_blocks_is_merged_with_the_block_before_it():
    base, experts, calibration = chain(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), between=lambda: nn.LayerNorm(4)
    )
    same = q.qp(base, dict.fromkeys(TASKS, experts["a"]), calibration, basis="elements", ridge=0.0)
    assert [r["layer"] for r in same.table] == [
        "blocks.0",
        "between.0",
        "blocks.1",
        "between.1",
        "blocks.2",
        "between.2",
    ]
    inside = Chain(*(nn.Sequential(b, n) for b, n in zip(base.blocks, base.between.values())))
    name = lambda k: f"blocks.{k.split('.')[1]}.{int(k.startswith('between'))}.{k.split('.')[2]}"
    moved = {t: {name(k): v for k, v in e.items()} for t, e in experts.items()}
    merge, expected = (
        q.qp(base, experts, calibration, basis="rows"),
        q.qp(inside, moved, calibration, basis="rows"),
    )
    for key, value in merge.state_dict.items():
        torch.testing.assert_close(value, expected.state_dict[name(key)])
        torch.testing.assert_close(same.state_dict[key], experts["a"][key])


class Dense(Chain):
    """Every block is given the sum of all outputs before it."""

    def forward(self, inputs):
        outputs = [inputs]
        for block in self.blocks:
            outputs.append(block(sum(outputs)))
        return outputs[-1]


def dense():
    """A model that does more between its blocks than pass the hidden state on, with experts and
    calibration."""
    _, _, calibration = chain(nn.Linear(4, 4))
    base = Dense(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    return base, experts_of(base), calibration


def test_a_model_whose_blocks_do_not_follow_each_other_is_merged_like_any_other():
    base, experts, calibration = dense()
    merge = q.qp(base, dict.fromkeys(TASKS, experts["a"]), calibration, basis="elements", ridge=0.0)
    assert [r["layer"] for r in merge.table] == ["blocks.0", "blocks.1", "blocks.2"]
    for name, value in experts["a"].items():
        torch.testing.assert_close(merge.state_dict[name], value, rtol=1e-9, atol=1e-9)


def test_layers_that_are_never_called_are_averaged_and_listed():
    base, experts, calibration = chain(nn.Linear(4, 4))
    base.forward = lambda inputs: inputs
    merge = q.qp(base, experts, calibration)
    assert not merge.table and set(merge.averaged.values()) == {
        "no calibration batch was seen to call its module"
    }


def test_a_block_used_twice_stays_one():
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    base, experts, calibration = chain(shared, nn.Linear(4, 4), shared)
    for e in experts.values():
        e.update(
            {k.replace("blocks.0", "blocks.2"): v for k, v in e.items() if k.startswith("blocks.0")}
        )
    merge = q.qp(base, experts, calibration, basis="elements")
    assert [r["layer"] for r in merge.table] == ["blocks.1"]
    model = merge.model(base)
    for name, value in merge.state_dict.items():
        assert torch.equal(model.state_dict()[name], value)


def test_norms_of_two_kinds_on_one_tensor_each_come_back():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (
                nn.LayerNorm(4, bias=False),
                nn.RMSNorm(4, eps=1e-6),
                nn.LayerNorm(4, bias=False, eps=0.1),
            )

        def forward(self, x):
            return self.one(x) + self.two(x) + self.three(x)

    base, experts, calibration = chain(Both())
    merge = q.qp(
        base,
        dict.fromkeys(TASKS, experts["a"]),
        calibration,
        basis="elements",
        ridge=0.0,
        prior=0.0,
    )
    for name, value in experts["a"].items():
        torch.testing.assert_close(merge.state_dict[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["own", "propagated"])
def test_experts_equal_to_the_base_leave_it_and_leave_nothing_to_capture(family, targets):
    base, _, calibration = vision()
    base = base.float()
    calibration = {
        t: [{"pixels": b["pixels"].float()} for b in batches] for t, batches in calibration.items()
    }
    merge = q.qp(
        base, dict.fromkeys(TASKS, base.state_dict()), calibration, basis=family, targets=targets
    )
    audited = q.audit(base, merge.state_dict, {t: base.state_dict() for t in TASKS}, calibration)
    assert {r["captured"] for r in merge.table} == {*audited["layers"].values()} == {None}
    for name, value in base.state_dict().items():
        assert torch.equal(merge.state_dict[name], value)


def test_one_expert_equal_to_the_base_pulls_its_task_towards_it():
    base, experts, calibration = vision()
    merge = q.qp(base, {**experts, "b": base.state_dict()}, calibration, basis="layer", ridge=0.0)
    assert all(0 <= r["captured"] < 1 for r in merge.table)


def bad_shape(experts):
    experts["b"]["cls"] = experts["b"]["cls"][..., :3]


def lacking(experts):
    del experts["b"]["blocks.1.up.weight"]


def unknown(experts):
    experts["b"]["head.weight"] = torch.zeros(1)


def damaged(experts):
    experts["c"]["cls"][..., 0] = float("inf")


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (
            bad_shape,
            ShapeMismatch,
            r"expert 'b', parameter 'cls': expected shape \(1, 1, 8\), found \(1, 1, 3\)",
        ),
        (lacking, MissingLayer, "expert 'b' lacks parameter 'blocks.1.up.weight'"),
        (unknown, MissingLayer, "expert 'b' has an unknown parameter 'head.weight'"),
        (
            damaged,
            NonFinite,
            "expert 'c', parameter 'cls': 1 of 8 values are NaN or infinite; the checkpoint is "
            "damaged",
        ),
        (lambda e: e.clear(), MergeError, "expected at least one state dict"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_bad_experts_are_refused_by_every_method(spoil, error, message):
    base, experts, calibration = vision()
    spoil(experts)
    for method in (q.qp, q.soup, q.task_arithmetic, q.ties, q.dare, q.regmean):
        with pytest.raises(error, match=message):
            method(base, experts, calibration)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inputs": "student"}, "inputs: expected one of .* found 'student'"),
        ({"targets": 2.0}, r"targets: expected a number in \[0, 1\], found 2.0"),
        ({"basis": "diagonal"}, "basis: expected one of .* found 'diagonal'"),
        ({"ridge": "auto"}, "ridge: expected a number ≥ 0 or 'cross-fitted', found 'auto'"),
        ({"folds": 1}, "one fold leaves nothing to choose by"),
        ({"basis": "groups", "groups": 5}, "output rows do not fall into 5 equal groups"),
        ({"basis": "groups", "groups": 0}, "groups: expected a whole number ≥ 1"),
        ({"basis": []}, "basis: expected a family or several to choose from, found none"),
        ({"ridges": ()}, "ridges: expected at least one number"),
        ({"targets": ["own"]}, r"targets: expected a number, found list"),
        ({"folds": 0}, "folds: expected a whole number ≥ 1"),
        ({"scope": "norms"}, "scope: expected one of .* found 'norms'"),
        (
            {"blocks": "layers"},
            "blocks: expected the path of an nn.ModuleList of the model, found 'layers'",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    base, experts, calibration = vision()
    with pytest.raises(MergeError, match=message):
        q.qp(base, experts, calibration, **options)


def test_empty_calibration_and_too_few_sequences_are_named():
    base, experts, calibration = vision()
    with pytest.raises(EmptyCalibration, match=r"no calibration batches for \['b'\]"):
        q.qp(base, experts, {**calibration, "b": []})
    with pytest.raises(EmptyCalibration, match=r"no calibration batches for \['b'\]"):
        q.qp(base, experts, {**calibration, "b": [{}]})
    with pytest.raises(
        MergeError,
        match=r"task 'c': the model does not take its calibration batch .'images': \(4, 1, 8, 8\).",
    ):
        q.qp(base, experts, {**calibration, "c": [{"images": torch.zeros(4, 1, 8, 8)}]})
    few = {**calibration, "c": [{"pixels": calibration["c"][0]["pixels"][:3]}]}
    with pytest.raises(
        EmptyCalibration,
        match=r"no calibration tokens for \['c'\] in folds \[3\] of 4; .* use fewer folds",
    ):
        q.qp(base, experts, few)


def test_a_layer_called_twice_is_averaged_and_listed():
    base, experts, calibration = tokens()
    for model in (base,):
        model.blocks[1].own = model.blocks[1].mix
    shared = {
        t: {**e, **{f"blocks.1.own.{p}": e[f"blocks.1.mix.{p}"] for p in ("weight", "bias")}}
        for t, e in (
            {
                t: {k: v for k, v in e.items() if k != "blocks.1.own.weight"}
                for t, e in experts.items()
            }
        ).items()
    }
    merge = q.qp(base, shared, calibration, basis="layer")
    assert "blocks.1.mix" not in [r["layer"] for r in merge.table]
    assert {"blocks.1.mix.weight", "blocks.1.mix.bias"} <= set(merge.averaged)


def test_a_model_needs_no_blocks():
    base = nn.Sequential(nn.Linear(2, 2)).double()
    expert = {k: v + 1 for k, v in base.state_dict().items()}
    merge = q.qp(base, {"a": expert}, {"a": [{"input": torch.randn(8, 2, dtype=torch.float64)}]})
    assert [r["layer"] for r in merge.table] == ["0"]
    assert all(torch.allclose(merge.state_dict[k], v) for k, v in expert.items())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_audit_in_sample_gives_the_captured_energy_of_every_layer(problem):
    base, experts, calibration = PROBLEMS[problem]()
    merge = q.qp(base, experts, calibration, basis="rows", ridge=1e-3)
    found = q.audit(base, merge.state_dict, experts, calibration)
    assert list(found["layers"]) == [r["layer"] for r in merge.table]
    for row in merge.table:
        assert found["layers"][row["layer"]] == pytest.approx(row["captured"], rel=1e-9, abs=1e-9)


class ConvolutionOfTokens(nn.Module):
    """A convolution along padded tokens, which may look back only: its last outputs are cut off."""

    def __init__(self, causal):
        super().__init__()
        self.table, self.out, self.causal = nn.Embedding(11, 4), nn.Linear(4, 3), causal
        self.mix = nn.Conv1d(4, 4, 3, padding=2 if causal else 1)

    def forward(self, input_ids, attention_mask):
        hidden = self.table(input_ids) * attention_mask[..., None]
        return self.out(torch.tanh(self.mix(hidden.mT)[..., : hidden.shape[1]].mT))


@pytest.mark.parametrize("causal", [True, False])
def test_a_convolution_along_tokens_is_solved_where_its_patches_are_theirs(causal):
    _, _, calibration = tokens()
    base = ConvolutionOfTokens(causal).double()
    merge = q.qp(
        base, dict.fromkeys(TASKS, experts_of(base)["a"]), calibration, basis="elements", ridge=0.0
    )
    assert [row["layer"] for row in merge.table] == (
        ["table", "out"] if causal else ["table", "mix", "out"]
    )
    assert set(merge.averaged.values()) == (
        {"its rows cannot be matched to the mask"} if causal else set()
    )
    for name, value in experts_of(base)["a"].items():
        torch.testing.assert_close(merge.state_dict[name], value)


OUTSIDE = "its weights are read without a call of its module"
AGAIN = "called more than once in a forward, on tokens that no argument of the model holds"


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda h, table: h @ table.weight.T, OUTSIDE),
        (lambda h, table: nn.functional.linear(h, table.weight), OUTSIDE),
        (lambda h, table: h + table(torch.tensor(1)).sum(), AGAIN),
        (lambda h, table: h.to(table.weight) + torch.zeros_like(table.weight).sum(), None),
        (lambda h, table: h.to(table.weight.dtype) * table.weight.shape[1], None),
    ],
    ids=["transposed", "head", "called", "alike", "dtype and shape"],
)
def test_a_table_that_is_also_multiplied_by_is_averaged(read, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(11, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return read(torch.tanh(self.mix(self.table(input_ids))), self.table)

    _, _, calibration = tokens()
    base = Model().double()
    averaged = q.qp(base, experts_of(base), calibration).averaged
    assert averaged == ({} if reason is None else {"table.weight": reason})


class Reasons(nn.Module):
    """Parameters that are no layer's, each for a reason of its own, and a layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again, self.scale = self.first, nn.Parameter(torch.ones(4))
        self.by_channel = nn.Conv2d(4, 4, 1, groups=4)
        self.batch, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.head_bias = self.head.bias
        self.read, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.batch(self.by_channel((self.scale * self.first(x))[..., None, None])).flatten(1)
        return self.head(torch.tanh(x @ self.read.weight))


def reasons(**options):
    torch.manual_seed(0)
    base = Reasons().double()
    experts = {t: base.state_dict() for t in TASKS}
    return q.qp(
        base,
        experts,
        {t: [{"x": torch.randn(8, 4, dtype=torch.float64)}] for t in TASKS},
        **options,
    )


def test_reasons_to_average_are_true():
    unknown = "a parameter of {}, which is no kind of layer that is solved"
    outside = "its weights are read without a call of its module"
    merge = reasons()
    assert [row["layer"] for row in merge.table] == ["first"]
    assert merge.averaged == {
        "scale": unknown.format("Reasons"), "head_bias": "tied to head.bias",
        "by_channel.weight": "convolutions in groups, or by channel, are not solved",
        "by_channel.bias": "convolutions in groups, or by channel, are not solved",
        "batch.weight": unknown.format("BatchNorm2d"), "batch.bias": unknown.format("BatchNorm2d"),
        "batch.running_mean": "a buffer", "batch.running_var": "a buffer",
        "head.weight": "tied to head_bias", "head.bias": "tied to head_bias",
        "read.weight": outside, "read.bias": outside,
        "unused.weight": "no calibration batch was seen to call its module",
        "unused.bias": "no calibration batch was seen to call its module",
    }  # fmt: skip
    narrow = reasons(scope="weights").averaged
    assert narrow["first.bias"] == narrow["again.bias"] == "outside the scope 'weights'"
    assert reasons(layers=["read"]).averaged["again.weight"] == "not among the layers asked for"


def test_a_shared_layer_can_be_asked_for_by_each_of_its_names():
    for name in ("first", "again"):
        merge = reasons(layers=[name])
        assert [row["layer"] for row in merge.table] == ["first"] and not {
            "first.weight",
            "again.weight",
        } & merge.averaged.keys()
    base = Reasons().double()
    batches = {t: [{"x": torch.randn(8, 4, dtype=torch.float64)}] for t in TASKS}
    assert list(
        q.layer_moments(base, {t: base.state_dict() for t in TASKS}, batches, ["again"])
    ) == ["first"]


def test_a_table_that_scales_what_it_looks_up_has_the_same_best_rows_and_is_audited():
    class ScaledEmbedding(nn.Embedding):
        def forward(self, ids):
            return 3.7 * super().forward(ids)

    base, experts, calibration = tokens()
    plain = q.qp(base, experts, calibration, basis="rows", ridge=1e-3)
    base.embedding = ScaledEmbedding(11, 8, _weight=base.embedding.weight.detach())
    merge = q.qp(base, experts, calibration, basis="rows", ridge=1e-3)
    torch.testing.assert_close(
        merge.state_dict["embedding.weight"], plain.state_dict["embedding.weight"]
    )
    found = q.audit(base, merge.state_dict, experts, calibration)["layers"]
    assert found == pytest.approx(
        {row["layer"]: row["captured"] for row in merge.table}, rel=1e-9, abs=1e-9
    )
    assert merge.table[0]["captured"] == pytest.approx(plain.table[0]["captured"])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_audit_end_to_end_is_what_whole_models_show(problem):
    """Output and hidden states of whole models run by hand, tasks weighing the same per token."""
    base, experts, calibration = PROBLEMS[problem]()
    state = q.soup(base, experts).state_dict
    run = lambda s, t: torch.cat([loaded(base, s)(**batch) for batch in calibration[t]]).detach()
    share = [
        sum(float((run(s, t) - run(experts[t], t)).square().sum()) / len(run(s, t)) for t in TASKS)
        for s in (state, base.state_dict())
    ]
    found = q.audit(base, state, experts, calibration)
    assert found["output"] == pytest.approx(1 - share[0] / share[1]) and len(found["drift"]) == len(
        base.blocks
    )
    merged = q.audit(base, experts["a"], {"a": experts["a"]}, calibration)
    assert (
        set(merged["layers"].values()) == {1.0}
        and merged["output"] == 1.0
        and set(merged["drift"]) == {0.0}
    )
    nothing = q.audit(base, base.state_dict(), dict.fromkeys(TASKS, base.state_dict()), calibration)
    assert set(nothing["layers"].values()) == {None} and nothing["output"] is None


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_an_auditor_holds_does_not_show(problem):
    """Several merges held against references made once, on all tasks and on some, are audited as by
    themselves."""
    base, experts, calibration = PROBLEMS[problem]()
    auditor, few = Auditor(base, experts, calibration), TASKS[1:]
    for state in (q.soup(base, experts).state_dict, experts["a"]):
        assert auditor(state) == q.audit(base, state, experts, calibration)
        assert auditor(state, few) == q.audit(
            base, state, {t: experts[t] for t in few}, calibration
        )


def test_an_audit_leaves_the_base_alone_and_refuses_what_does_not_fit():
    base, experts, calibration = tokens()
    base.train()
    q.audit(base, experts["a"], experts, calibration)
    assert base.training
    with pytest.raises(MissingLayer, match="expert 'merge' lacks parameter 'norm.weight'"):
        q.audit(
            base,
            {k: v for k, v in experts["a"].items() if k != "norm.weight"},
            experts,
            calibration,
        )


def test_named_layers_alone_are_solved_and_as_in_a_whole_pass_when_they_come_first():
    base, experts, calibration = vision()
    whole, part = (
        q.qp(base, experts, calibration, basis="rows", layers=layers)
        for layers in (None, ["embed", "blocks.0.norm1"])
    )
    assert [r["layer"] for r in part.table] == ["embed", "blocks.0.norm1"]
    soup = q.soup(base, experts).state_dict
    for name, value in part.state_dict.items():
        same = whole.state_dict if name.startswith(("embed", "blocks.0.norm1")) else soup
        torch.testing.assert_close(value, same[name])
    assert "blocks.0.up.weight" in part.averaged
    with pytest.raises(
        MissingLayer,
        match=(
            "layer 'blocks.7.up': not among the layers of scope 'all', which are "
            ".*'blocks.0.attention.key'"
        ),
    ):
        q.qp(base, experts, calibration, layers=["blocks.7.up"])


@pytest.mark.parametrize("layer", ["blocks.0.up", "blocks.1.norm1"])
def test_moments_of_one_layer_price_merges_in_it(layer):
    """For experts that differ in one layer: any basis solved from its moments is the merge that a
    pass makes."""
    base, _, calibration = vision()
    experts = {
        t: {k: e[k] if k.startswith(layer + ".") else v for k, v in base.state_dict().items()}
        for t, e in experts_of(base).items()
    }
    view, moments, updates = q.layer_moments(base, experts, calibration, [layer])[layer]
    for targets in ("own", "propagated"):
        merge = q.qp(
            base, experts, calibration, basis="rotated_rows", targets=targets, layers=[layer]
        )
        update, row = q.QP("rotated_rows")(moments, updates)
        parts = view.parts(view.matrix(base.state_dict()) + update)
        for name, value in merge.state_dict.items():
            torch.testing.assert_close(
                value, parts.get(name, base.state_dict()[name]), rtol=1e-8, atol=1e-10
            )
        assert merge.table[0]["captured"] == pytest.approx(row["captured"], rel=1e-9)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_sweep_depends_on_the_weights_before_a_layer_only(problem, monkeypatch):
    """Starting from other weights in the layers to be solved ends in the same place: a second sweep
    would change nothing."""
    import qpmerge_lite.sequential as sequential

    base, experts, calibration = PROBLEMS[problem]()
    first = q.qp(base, experts, calibration, basis="elements")
    monkeypatch.setattr(
        sequential, "average", lambda *_: {k: v.clone() for k, v in first.state_dict.items()}
    )
    for name, value in q.qp(base, experts, calibration, basis="elements").state_dict.items():
        torch.testing.assert_close(value, first.state_dict[name], rtol=1e-10, atol=1e-12)


def test_a_layer_that_is_called_twice_has_no_moments():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(4, 4)

        def forward(self, x):
            return self.again(torch.tanh(self.again(x)))

    base, experts, calibration = chain(Twice())
    with pytest.raises(
        MissingLayer, match="layer 'blocks.0.again': expected to be called once in a forward pass"
    ):
        q.layer_moments(base, experts, calibration, ["blocks.0.again"])
