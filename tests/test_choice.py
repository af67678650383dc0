"""A merge chosen without labels: what it is judged by, what it is chosen from, and when another one
than the first is taken."""

import pytest
import torch
from torch import nn
from toys import experts_of

import qpmerge_lite as q
from qpmerge_lite.calibration import check_calibration
from qpmerge_lite.choice import automatic
from qpmerge_lite.choice.criteria import Criterion, Lead
from qpmerge_lite.errors import EmptyCalibration, MergeError, NonFinite

TASKS = ("a", "b", "c")
WIDTH, CLASSES = 6, 3


def inputs(count=8, seed=0, tasks=TASKS, per_batch=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        task: [
            {"input": torch.randn(per_batch, WIDTH, generator=generator, dtype=torch.float64)}
            for _ in range(count // per_batch)
        ]
        for task in tasks
    }


@pytest.fixture
def base():
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(*layers).double()


@pytest.fixture
def experts(base):
    return experts_of(base, tasks=TASKS)


@pytest.fixture
def heads():
    torch.manual_seed(1)
    made = {task: nn.Linear(WIDTH, CLASSES).double() for task in TASKS}
    return {task: head.requires_grad_(False) for task, head in made.items()}


def batches(calibration):
    return check_calibration(calibration, TASKS, "cpu")


def logits(model, state, head, batch):
    return head(torch.func.functional_call(model, state, (), batch))


# ------------------------------------------------------------------------------------- criteria


def test_divergence_is_that_of_torch(base, experts, heads):
    calibration = inputs()
    judge = Criterion(base, experts, batches(calibration), heads)
    merged = q.soup(base, experts).state_dict
    errors = judge.errors(merged)
    kl = nn.KLDivLoss(reduction="none", log_target=True)
    totals = {"merged": 0.0, "base": 0.0}
    for task in TASKS:
        found = []
        for batch in calibration[task]:
            expert = logits(base, experts[task], heads[task], batch).log_softmax(1)
            for name, state in (("merged", merged), ("base", base.state_dict())):
                other = logits(base, state, heads[task], batch).log_softmax(1)
                divergence = kl(other, expert).sum(1)
                totals[name] += float(divergence.sum()) / 8
                if name == "merged":
                    found.append(divergence)
        torch.testing.assert_close(errors[task], torch.cat(found))
    assert judge.name == "captured divergence"
    assert judge.captured(errors) == pytest.approx(1 - totals["merged"] / totals["base"])


def test_energy_is_that_of_an_audit(base, experts):
    calibration = inputs()
    judge = Criterion(base, experts, batches(calibration))
    state = q.ties(base, experts).state_dict
    audited = q.audit(base, state, experts, calibration)["output"]
    assert judge.name == "captured energy"
    assert judge.captured(judge.errors(state)) == pytest.approx(audited, abs=1e-12)


class Tokens(nn.Module):
    """Returns a state for every token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask):
        return self.layer(self.embedding(input_ids))


def test_padding_does_not_count():
    base = Tokens().double()
    experts = experts_of(base, tasks=TASKS)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    one, other = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 0], [4, 5, 6]])
    errors = []
    for tokens in (one, other):
        calibration = {task: [{"input_ids": tokens, "attention_mask": mask}] for task in TASKS}
        errors.append(Criterion(base, experts, batches(calibration)).errors(experts["a"])["b"])
    assert torch.equal(*errors) and errors[0].shape == (2,) and (errors[0] > 0).all()


def test_experts_that_equal_the_base_leave_nothing_to_capture(base, heads):
    experts = {task: base.state_dict() for task in TASKS}
    judge = Criterion(base, experts, batches(inputs()), heads)
    nothing = judge.errors(base.state_dict())
    moved = {name: value + 1 for name, value in base.state_dict().items()}
    assert judge.captured(nothing) == 1.0
    assert judge.captured(judge.errors(moved)) == -torch.inf
    assert judge.lead(nothing, nothing) == (0.0, 0.0)


def test_a_lead_is_paired_over_inputs(base, experts):
    judge = Criterion(base, experts, batches(inputs()))
    errors = judge.errors(q.soup(base, experts).state_dict)
    worse = {task: found + 0.25 for task, found in errors.items()}
    lead = judge.lead(errors, worse)
    assert lead.difference == pytest.approx(judge.captured(errors) - judge.captured(worse))
    assert lead.difference > 0 and lead.error == pytest.approx(0, abs=1e-9)
    generator = torch.Generator().manual_seed(3)
    noisy = {
        task: found + torch.randn(found.shape, generator=generator) for task, found in worse.items()
    }
    saved = torch.stack([noisy[task] - errors[task] for task in TASKS])  # (T, N)
    total = sum(float(judge.errors(base.state_dict())[task].mean()) for task in TASKS)
    expected = float((saved.var(1) / saved.shape[1]).sum().sqrt()) / total
    assert judge.lead(errors, noisy).error == pytest.approx(expected)


def test_outputs_that_are_not_finite_are_refused(base, experts):
    judge = Criterion(base, experts, batches(inputs()))
    broken = {name: value * torch.nan for name, value in base.state_dict().items()}
    with pytest.raises(NonFinite, match="task 'a', batch 0: the model's output"):
        judge.errors(broken)


# -------------------------------------------------------------------------------------- choices


def test_halves_are_every_other_input_whatever_the_batches():
    calibration = inputs(count=9, per_batch=3)
    for number, batch in enumerate(calibration["a"]):
        batch["input"][:, 0] = torch.arange(3) + 3 * number
    solved_on, left_out = automatic.halves(batches(calibration))
    first = torch.cat([batch["input"][:, 0] for batch in solved_on["a"]])
    second = torch.cat([batch.arguments["input"][:, 0] for batch in left_out["a"]])
    assert first.tolist() == [0, 2, 4, 6, 8] and second.tolist() == [1, 3, 5, 7]


def test_a_blend_is_the_sum_of_its_updates(base, experts):
    calibration = inputs()
    tried = automatic.Candidates(base, experts, calibration)
    name = next(iter(automatic.BLENDS))
    merged, start = tried.merge(name), base.state_dict()
    programme = q.qp(
        base,
        experts,
        calibration,
        basis="elements",
        targets=0.5,
        ridge=automatic.RIDGE,
        prior=automatic.PRIOR,
        penalty="diagonal",
        folds=1,
    )
    parts = {
        "half": programme.state_dict,
        "tsv": q.tsv_merge(base, experts).state_dict,
        "iso": q.iso_c(base, experts).state_dict,
    }
    assert automatic.BLENDS[name].keys() == parts.keys()
    for entry, origin in start.items():
        weights = automatic.BLENDS[name]
        update = sum(weights[part] * (state[entry] - origin) for part, state in parts.items())
        torch.testing.assert_close(merged.state_dict[entry], origin + update)
    assert [row["layer"] for row in merged.table] == [row["layer"] for row in programme.table]
    assert merged.averaged == programme.averaged


def test_the_merge_is_the_chosen_candidate_solved_on_all_inputs(base, experts, heads):
    calibration, before = inputs(count=16), {k: v.clone() for k, v in base.state_dict().items()}
    merge = q.auto(base, experts, calibration, heads=heads)
    assert isinstance(merge, q.AutoMerge) and merge.criterion == "captured divergence"
    again = automatic.Candidates(base, experts, calibration).merge(merge.chosen)
    for name, value in again.state_dict.items():
        torch.testing.assert_close(merge.state_dict[name], value, rtol=0, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    rows = {row["name"]: row for row in merge.candidates}
    assert tuple(rows) == automatic.NAMES
    assert rows[merge.chosen]["lead"] == 0.0 and rows["base"]["captured"] == 0.0
    for bound in automatic.BOUNDS:
        assert rows[bound]["lead"] >= 0.0


def test_experts_of_one_task_come_back_as_they_are(base, heads):
    """Where all experts are one, a long prior goes too far: the soup is that expert."""
    expert = experts_of(base, tasks=TASKS)["a"]
    copies = dict.fromkeys(TASKS, expert)
    for given in (None, heads):
        merge = q.auto(base, copies, inputs(count=16), heads=given)
        assert merge.chosen == "soup"
        for name, value in expert.items():
            torch.testing.assert_close(merge.state_dict[name], value)


class Judge:
    """A criterion with given values: all leads have one standard error."""

    def __init__(self, name, captured, error):
        self.name, self.values, self.error = name, captured, error

    def captured(self, name):
        return self.values[name]

    def lead(self, one, other):
        return Lead(self.values[one] - self.values[other], self.error)


@pytest.mark.parametrize(
    "criterion, changes, chosen",
    [
        ("captured divergence", {}, "first"),
        ("captured divergence", {"half": 0.59}, "first"),
        ("captured divergence", {"half": 0.61}, "half"),
        ("captured energy", {"half": 0.9}, "first"),
        ("captured divergence", {"half": 0.61, "soup": 0.605}, "half"),
        ("captured divergence", {"half": 0.50, "soup": 0.51}, "soup"),
        ("captured divergence", {"half": 0.59, "soup": 0.51}, "half"),
        ("captured energy", {"half": 0.59, "soup": 0.51}, "half"),
        ("captured energy", {"base": 0.51}, "base"),
    ],
)
def test_another_candidate_is_taken_when_it_is_clearly_better(criterion, changes, chosen):
    """By two standard errors of 0.05 where predictions say so; the best, once a bound is ahead."""
    first = next(iter(automatic.BLENDS))
    values = dict.fromkeys(automatic.BLENDS, 0.4) | dict.fromkeys(automatic.BOUNDS, 0.1)
    values |= {first: 0.5} | changes
    judge = Judge(criterion, values, 0.05)
    found = automatic.choose(judge, {name: name for name in automatic.NAMES})
    assert found == (first if chosen == "first" else chosen)


def test_what_cannot_be_chosen_from_is_refused(base, experts, heads):
    with pytest.raises(EmptyCalibration, match="'a': expected at least two .* found one"):
        q.auto(base, experts, inputs(count=1, per_batch=1))
    with pytest.raises(MergeError, match="heads: expected one for every expert"):
        q.auto(base, experts, inputs(), heads={"a": heads["a"]})
    with pytest.raises(EmptyCalibration, match="no calibration batches for"):
        q.auto(base, experts, inputs(tasks=("a", "b")))
