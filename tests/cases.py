"""Inputs on which a merge once went wrong, and the properties that hold on them."""

import copy
import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import qpmerge_lite as q

TASKS = ("a", "b")
ELEMENTS = {"basis": "elements", "folds": 1, "ridge": 0.01}


def tuned(base, scale=0.1):
    """State dicts of two experts near a base; tied weights stay tied, and buffers as they are."""
    experts = {}
    for task in TASKS:
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        experts[task] = expert.state_dict()
    return experts


def both(*batches):
    """The same calibration batches for both tasks."""
    return {task: list(batches) for task in TASKS}


def apart(make, *sizes):
    """Batches of inputs of its own for every task: ``make`` is called with each of the sizes."""
    return {task: [make(*size) for size in sizes] for task in TASKS}


def copies(experts):
    """The first expert twice."""
    return dict.fromkeys(TASKS, experts[TASKS[0]])


def distance(one, other):
    """Largest difference between numbers of two state dicts."""
    largest = 0.0
    for name, value in other.items():
        if value.is_floating_point() or value.is_complex():
            difference = (one[name].to(torch.complex128) - value.to(torch.complex128)).abs()
            largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
    return largest


def tokens(count, length=7):
    """Token ids (count, length) from 3 to 39."""
    return torch.randint(3, 40, (count, length))


def beginnings(count, length=7, least=2):
    """A mask (count, length) of texts of different lengths, padded on the right."""
    return (torch.arange(length) < torch.randint(least, length, (count, 1))).long()


def under(ids, mask, token):
    """The same texts with another token under the zeros of the mask."""
    return torch.where(mask == 1, ids, token)


def masked(model, ids, mask, token=1):
    """A batch of texts padded with a token; positions are counted where the model takes them."""
    batch = {"input_ids": under(ids, mask, token), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def longer(model, batch, side, amount=3):
    """A batch with more padding on one side."""
    amounts = (0, amount) if side == "right" else (amount, 0)
    ids = F.pad(batch["input_ids"], amounts, value=1)
    return batch | masked(model, ids, F.pad(batch["attention_mask"], amounts))


def single(batches):
    """Batches of one sequence each, in the same order."""
    split = []
    for batch in batches:
        count = len(next(iter(batch.values())))
        split += [{k: v[i : i + 1] for k, v in batch.items()} for i in range(count)]
    return split


def assert_every_parameter_is_solved_or_listed(base, merge):
    """Every parameter belongs to a merged layer, or is averaged for a reason."""
    layers = {row["layer"] for row in merge.table}
    tied = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        solved = any(name.rpartition(".")[0] in layers for name in names)
        listed = [name for name in names if name in merge.averaged]
        assert solved or listed == names, f"{names} is neither solved nor listed"
        assert not (solved and listed), f"{names} is both solved and listed"
    for name, reason in merge.averaged.items():
        assert isinstance(reason, str) and reason, name


def assert_copies_come_back(base, calibration, tolerance=1e-9, **options):
    """The merge of one expert with itself is that expert."""
    experts = copies(tuned(base))
    merge = q.qp(base, experts, calibration, **(ELEMENTS | options))
    assert distance(merge.state_dict, experts[TASKS[0]]) < tolerance
    assert_every_parameter_is_solved_or_listed(base, merge)
    return merge


def assert_batches_do_not_matter(base, calibration, tolerance=1e-9, **options):
    """Neither their order nor their size changes the merge, nor the audit of it."""
    experts = tuned(base)
    other = {task: single(batches)[::-1] for task, batches in calibration.items()}
    one = q.qp(base, experts, calibration, **(ELEMENTS | options))
    two = q.qp(base, experts, other, **(ELEMENTS | options))
    assert distance(one.state_dict, two.state_dict) < tolerance
    assert {row["layer"] for row in one.table} == {row["layer"] for row in two.table}
    soup = q.soup(base, experts).state_dict
    energies = [q.audit(base, soup, experts, batches) for batches in (calibration, other)]
    assert abs(energies[0]["output"] - energies[1]["output"]) < tolerance
    return one


def assert_same_merge(base, one, other, tolerance=1e-9, **options):
    """Two calibration sets give the same merge, which is returned."""
    experts = tuned(base)
    merges = [q.qp(base, experts, batches, **(ELEMENTS | options)) for batches in (one, other)]
    assert distance(*(merge.state_dict for merge in merges)) < tolerance
    assert merges[0].averaged == merges[1].averaged
    return merges[0]


@torch.no_grad()
def outputs(model, state, batch):
    """What a model returns first under a state dict."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    found = loaded.eval()(**batch)
    return found if isinstance(found, torch.Tensor) else found[0]


def plain_energy(base, merged, experts, calibration):
    """Captured energy of the output from plain forwards, tasks weighing the same per row."""
    lost = energy = 0.0
    for task, batches in calibration.items():
        aims = [outputs(base, experts[task], batch) for batch in batches]
        rows = sum(aim[..., 0].numel() for aim in aims)
        for batch, aim in zip(batches, aims):
            lost += float((outputs(base, merged, batch) - aim).square().sum()) / rows
            energy += float((outputs(base, base.state_dict(), batch) - aim).square().sum()) / rows
    return 1 - lost / energy


@dataclass
class Seen:
    """What linear layers read and put out in plain forwards: layer -> rows (N, ·)."""

    reads: dict = field(default_factory=dict)
    puts: dict = field(default_factory=dict)


@torch.no_grad()
def watch(base, state, batches, layers):
    """Reads and outputs of some linear layers under a state dict, over batches without padding."""
    model, seen, hooks = copy.deepcopy(base), Seen(), []
    model.load_state_dict(state)
    for name in layers:

        def hook(module, args, kwargs, output, name=name):
            (read,) = (*args, *kwargs.values())
            seen.reads.setdefault(name, []).append(read.flatten(0, -2).double())
            seen.puts.setdefault(name, []).append(output.flatten(0, -2).double())

        hooks.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    for batch in batches:
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    for rows in (seen.reads, seen.puts):
        rows |= {name: torch.cat(parts) for name, parts in rows.items()}
    return seen


def slopes(base, state, calibration, experts, layers):
    """Norm of the gradient of each layer's squared error under a state, experts being aims."""
    total = dict.fromkeys(layers, 0.0)
    for task, batches in calibration.items():
        own = watch(base, state, batches, layers)
        aim = watch(base, experts[task], batches, layers)
        for name in layers:
            reads = own.reads[name]
            reads = torch.cat([reads, torch.ones_like(reads[:, :1])], 1)
            bias = base.get_submodule(name).bias is not None
            reads = reads if bias else reads[:, :-1]
            total[name] = total[name] + (own.puts[name] - aim.puts[name]).mT @ reads / len(reads)
    return {name: float(gradient.norm()) for name, gradient in total.items()}


def assert_stationary(base, calibration, tolerance=1e-6):
    """No step in the weights of a linear layer lowers its squared error, seen from plain forwards.

    Tasks must have inputs of their own: on the same ones the average can be the best there is.
    """
    experts = tuned(base)
    merge = q.qp(base, experts, calibration, basis="elements", folds=1, ridge=0.0)
    solved = [row["layer"] for row in merge.table]
    layers = [name for name in solved if isinstance(base.get_submodule(name), nn.Linear)]
    assert layers
    found = slopes(base, merge.state_dict, calibration, experts, layers)
    reference = slopes(base, q.soup(base, experts).state_dict, calibration, experts, layers)
    worst = max(layers, key=lambda name: found[name] / reference[name])
    assert found[worst] < tolerance * reference[worst], worst
    return merge
