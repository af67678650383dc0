"""Merges that tests make in one process and in several, and those that several refuse.

Run as ``shares.py FOLDER`` this starts groups of processes, each of which leaves what it made in
``FOLDER/COUNT/NUMBER``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from toys import TASKS, experts_of, tokens, vision

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError
from qpmerge_lite.sequential import Pass, PassOptions
from qpmerge_lite.solvers import QP, RegMean


class Branching(nn.Module):
    """A mixture whose batches say which of two experts they go through, in which order two layers
    are called, how many tokens a layer reads, and whether two layers read one tensor."""

    def __init__(self, width=4):
        super().__init__()
        self.start, self.end = nn.Linear(width, width), nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)
        self.few, self.same = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, route):
        sign = bool(x[0, 0, 0] > 0)  # of all sequences of a batch
        x = torch.tanh(self.start(x))
        x = x + self.experts[route](x)
        for layer in (self.one, self.other) if sign or route == 0 else (self.other, self.one):
            x = torch.tanh(layer(x))
        x = x + self.few(x[:, : 2 if sign else 1]).mean(1, keepdim=True)
        return self.end(x) + self.same(x if sign else x.clone())


def branching():
    """(base, experts, calibration) in which no two neighbouring batches go the same way."""
    torch.manual_seed(0)
    base = Branching().double()
    calibration = {}
    for task in TASKS:
        calibration[task] = []
        for number in range(8):
            x = torch.randn(6, 3, 4, dtype=torch.float64)
            x[:, 0, 0] = x[:, 0, 0].abs() * (1 if number % 4 < 2 else -1)
            calibration[task].append({"x": x, "route": number % 2})
    return base, experts_of(base), calibration


class Routed(nn.Module):
    """A mixture of experts over tokens, and a router."""

    def __init__(self, width=4):
        super().__init__()
        self.router, self.end = nn.Linear(width, 2), nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, y = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = torch.tanh(expert(flat[chosen == number]))
        return self.end(y.view_as(x))


def routed():
    torch.manual_seed(0)
    base = Routed().double()
    draw = lambda: {"x": torch.randn(5, 3, 4, dtype=torch.float64)}
    return base, experts_of(base), {task: [draw() for _ in range(4)] for task in TASKS}


def one(method, make=vision, **options):
    """A case of one merge."""
    return lambda group: {"merge": method(*make(), group=group, **options)}


def heads():
    torch.manual_seed(3)
    made = {task: nn.Linear(8, 4).double() for task in TASKS}
    return {task: head.requires_grad_(False) for task, head in made.items()}


def towards_an_anchor(group):
    base, experts, calibration = vision()
    anchor = q.ties(base, experts).state_dict
    return {"merge": q.qp(base, experts, calibration, anchor=anchor, group=group, folds=2)}


def together(group):
    recipes = {
        "merged": q.Recipe(QP("elements", ridge=0.1), folds=1),
        "own inputs": q.Recipe(QP("rows", ridge=0.1), inputs="expert", folds=1),
        "regmean": q.Recipe(RegMean(), "expert", "propagated", "weights", folds=1),
        "blocks": q.Recipe(RegMean(), "block", "propagated", "weights", folds=1),
    }
    return q.merge_together(*vision(), recipes, group=group)


CASES = {
    "qp rows": one(q.qp, folds=2),
    "qp rotated rows": one(q.qp, basis="rotated_rows", folds=2),
    "qp rotated columns": one(q.qp, basis="rotated_columns", folds=2),
    "qp groups": one(q.qp, basis="groups", groups=4, folds=2, scope="weights"),
    "qp chooses a basis": one(q.qp, basis=["rows", "elements"], folds=2),
    "qp blends": one(q.qp, targets="blend", folds=2, basis="elements"),
    "qp propagates": one(q.qp, targets="propagated", folds=2, basis="elements"),
    "qp own inputs": one(q.qp, inputs="expert", folds=2, basis="elements"),
    "qp some layers": one(q.qp, layers=["blocks.0.attention.query", "blocks.1.up"], folds=2),
    "qp runs blocks again": one(q.qp, activations=0, folds=2, basis="elements"),
    "qp tokens": one(q.qp, tokens, basis="elements", folds=2),
    "qp branches": one(q.qp, branching, basis="elements", folds=2),
    "qp routes": one(q.qp, routed, basis="elements", folds=2),
    "regmean": one(q.regmean),
    "regmean branches": one(q.regmean, branching),
    "regmean_plus_plus": one(q.regmean_plus_plus),
    "lot": one(q.lot),
    "featcal": one(q.featcal),
    "esm": one(q.esm),
    "sketched": one(q.sketched, rank=4),
    "auto": one(q.auto),
    "auto with heads": one(q.auto, heads=heads()),
    "anchor": towards_an_anchor,
    "together": together,
}
# of four processes some have nothing to tell of a layer
OF_FOUR = ["qp rows", "qp tokens", "qp branches", "qp routes", "regmean branches", "together"]
NAMES = {2: list(CASES), 4: OF_FOUR}


def refused(function):
    """What a function is refused with."""
    try:
        function()
    except MergeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def damaged(base, experts, calibration, number):
    """One value of the second batch of a task, which is the second process's, is no number."""
    calibration["b"][1]["pixels"][0, 0, 0, 0] = torch.nan
    return base, experts, calibration


def shuffled(base, experts, calibration, number):
    """Every process has batches of its own."""
    calibration["b"] = [{"pixels": batch["pixels"] + number} for batch in calibration["b"]]
    return base, experts, calibration


def drawn(base, experts, calibration, number):
    """Every process has a head of its own."""
    with torch.no_grad():
        next(base.parameters()).add_(number)
    return base, experts, calibration


def misshapen(base, experts, calibration, number):
    """A batch that the model does not take, in the last process."""
    calibration["c"].append({"pixels": torch.randn(3, 1, 7, 8, dtype=torch.float64)})
    return base, experts, calibration


def scarce(base, experts, calibration, number):
    return base, experts, {task: batches[:1] for task, batches in calibration.items()}


REFUSALS = [damaged, shuffled, drawn, misshapen, scarce]


def refusals(number, group):
    """Name -> what this process is refused with."""
    told = {}
    for change in REFUSALS:
        given = change(*vision(), number)
        told[change.__name__] = refused(lambda given=given: q.regmean(*given, group=group))
    told["no group"] = refused(lambda: q.regmean(*vision(), group="all"))
    return told


def counted(group):
    """All-reduces of a merge, and its stages, all of whose layers have a bias."""
    count, all_reduce = 0, torch.distributed.all_reduce

    def counting(*arguments, **options):
        nonlocal count
        count += 1
        return all_reduce(*arguments, **options)

    torch.distributed.all_reduce = counting
    recipe = q.Recipe(QP("elements", ridge=0.1), folds=1)
    sweep = Pass(*vision(), {"merge": recipe}, PassOptions(group=group))
    sweep.run()
    torch.distributed.all_reduce = all_reduce
    return count, len(sweep.groups)


def alone():
    """Whether a merge without ``group`` asks nothing of others, and is that of one process."""
    names = ("all_reduce", "all_gather_object", "broadcast")
    kept = {name: getattr(torch.distributed, name) for name in names}
    for name in names:
        setattr(torch.distributed, name, None)
    merges = CASES["featcal"](None)
    for name, function in kept.items():
        setattr(torch.distributed, name, function)
    return merges


def loss(number, count, group):
    """What a process is refused with when the last one ends while a layer is solved."""
    solver = QP("rows", ridge=0.1)

    def ending(moments, updates):
        if moments.layer == "blocks.0.up" and number == count - 1:
            os._exit(0)
        return solver(moments, updates)

    return refused(lambda: q.merge_sequentially(*vision(), ending, group=group, progress=False))


def save(folder, name, merges):
    for which, merge in merges.items():
        path = folder / f"{name}, {which}"
        state = {key: value.clone().contiguous() for key, value in merge.state_dict.items()}
        save_file(state, f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps(merge.averaged))


def main(number, count, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=count
    )
    group, own = torch.distributed.group.WORLD, folder / str(number)
    own.mkdir()
    for name in NAMES[count]:
        save(own, name, CASES[name](group))
    save(own, "alone", alone())
    told = refusals(number, group) | {"counted": counted(group)}
    (own / "told.json").write_text(json.dumps(told))
    (own / "loss").write_text(loss(number, count, group))


if __name__ == "__main__":
    children = []
    for count in NAMES:
        folder = Path(sys.argv[1], str(count))
        folder.mkdir()
        for number in range(count):
            children.append(os.fork())
            if children[-1] == 0:
                main(number, count, folder)
                os._exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
