"""Time and memory of our merges beside fusion_bench's, called, never copied; ``make peers``.

An encoder of CLIP's shape with random weights, K experts and 64 random pictures each. Every row is
a process of its own on one thread. Times are of the processor, in units of the forwards that a
merge on merged inputs cannot avoid; memory is by how much the first merge raised the peak of its
process, which holds the models and the pictures before.
"""

import argparse
import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from types import SimpleNamespace

import torch
from fusion_bench.method.regmean.clip_regmean import RegMeanAlgorithmForCLIP
from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import (
    RegMeanAlgorithmForCLIPPlusPlus,
)
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.modelpool import BaseModelPool
from torch import nn
from torch.utils.data import TensorDataset
from transformers import CLIPVisionConfig, CLIPVisionModel

import qpmerge_lite as q
from qpmerge_lite.companion.experiments.costs import measured, price, stages_of, work_of
from qpmerge_lite.companion.experiments.timing import apart, forwards, perturbed, verdict
from qpmerge_lite.diagnostic import RIDGES

WIDTH = 384
PICTURES = 64
ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 32,
}
THEIRS = {  # fusion_bench's own settings, up to the number of pictures
    "num_regmean_examples": PICTURES,
    "exclude_param_names_regex": [],
    "reduce_non_diagonal_ratio": 0.95,
    "weight_transpose": True,
    "dataloader_kwargs": {"batch_size": PICTURES, "num_workers": 0},
}
AGREES = 1e-2  # of the updates of encoder layers, in float32 and with their inverse without a ridge
FIXED = {"basis": "elements", "ridge": 0.01, "folds": 1}
OURS = {
    "regmean": q.regmean,
    "regmean++": q.regmean_plus_plus,
    "featcal": q.featcal,
    "qp rows": partial(q.qp, basis="rows"),
    "qp elements, propagated, fixed ridge": partial(q.qp, **FIXED, targets="propagated"),
    "qp elements, own, fixed ridge": partial(q.qp, **FIXED),
    "qp elements, own, best ridge": partial(q.qp, basis="elements"),
}
WANTED = {
    "qp elements, propagated, fixed ridge": 2.0,
    "qp elements, own, fixed ridge": 4.0,
    "qp elements, own, best ridge": 7.0,
}
OF_FLOOR = {"qp elements, own, fixed ridge": 1, "qp elements, own, best ridge": 4}  # folds


class Tower(nn.Module):
    """A vision model under the name that fusion_bench looks for."""

    def __init__(self, vision_model: nn.Module):
        super().__init__()
        self.vision_model = vision_model

    @property
    def device(self):
        """Where the model is."""
        return self.vision_model.device

    def forward(self, pixel_values):
        """Last states, and the pooled state of every picture."""
        return self.vision_model(pixel_values=pixel_values, return_dict=False)


class Headless:
    """Without the zero-shot head, which no layer is merged by: logits are the pooled states."""

    clip_processor = None  # pictures are tensors

    def on_regmean_start(self):
        """Nothing is fetched."""

    def compute_logits(self, module, batch, task):
        """One forward."""
        return module(batch[0])[1]


class TheirRegMean(Headless, RegMeanAlgorithmForCLIP):
    """fusion_bench's RegMean."""


class TheirRegMeanPlusPlus(Headless, RegMeanAlgorithmForCLIPPlusPlus):
    """fusion_bench's RegMean++, on layers that return a tensor and no tuple any more."""

    _config_mapping = RegMeanAlgorithmPlusPlus._config_mapping  # theirs for CLIP cannot be opened

    def layer_batches_forward(self, layer, batches_input):
        """What a layer makes of every batch."""
        return [layer(batch, attention_mask=None).detach().cpu() for batch in batches_input]


PEERS = {"regmean": TheirRegMean, "regmean++": TheirRegMeanPlusPlus}


class Problem:
    """A base, its experts and their pictures; fusion_bench's models share the tensors of ours."""

    def __init__(self, experts: int):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.base = CLIPVisionModel(CLIPVisionConfig(**ENCODER)).eval().requires_grad_(False)
        self.experts, self.calibration = {}, {}
        for k in range(experts):
            self.experts[f"task{k}"] = perturbed(self.base)
            pictures = torch.randn(PICTURES, 3, 224, 224)
            self.calibration[f"task{k}"] = [{"pixel_values": pictures}]

    def forwards(self) -> None:
        """Every batch through its expert and through the base."""
        forwards(self.base, self.experts, self.calibration)

    def pool(self) -> BaseModelPool:
        """Base, experts and pictures as fusion_bench takes them."""
        models = {"_pretrained_": Tower(self.base)}
        for task, state in self.experts.items():
            with torch.device("meta"):
                empty = CLIPVisionModel(self.base.config).eval()
            empty.embeddings.position_ids = self.base.embeddings.position_ids
            empty.load_state_dict(state, assign=True)
            models[task] = Tower(empty.requires_grad_(False))
        pool = BaseModelPool(models)
        pool.load_train_dataset = self.pictures
        return pool

    def pictures(self, task: str) -> TensorDataset:
        """Pairs of a picture and a label that nothing reads."""
        pictures = self.calibration[task][0]["pixel_values"]
        return TensorDataset(pictures, torch.zeros(len(pictures)))


def fingerprint(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Projections of every entry on four random directions, which are always the same."""
    draw, found = torch.Generator().manual_seed(0), []
    for name in sorted(state):
        value = state[name].flatten().double()
        directions = torch.randn(4, len(value), generator=draw, dtype=torch.float64)
        found.append(directions @ value / len(value) ** 0.5)
    return torch.cat(found)


def of_layers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of the encoder's layers, by their names in the vision model."""
    names = {name.removeprefix("vision_model."): value for name, value in state.items()}
    return {name: value for name, value in names.items() if name.startswith("encoder.layers.")}


def row(name: str, whose: str, experts: int, repeats: int):
    """Time and memory of a merge, the fingerprint of its result, and the floor, None if unknown."""
    problem, merged = Problem(experts), {}
    pool = problem.pool() if whose == "theirs" else None

    def ours():
        merged.update(OURS[name](problem.base, problem.experts, problem.calibration).state_dict)

    def theirs():
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            merged.update(PEERS[name](**THEIRS).run(pool).state_dict())

    logging.disable(logging.WARNING)
    found = measured(theirs if whose == "theirs" else ours, problem.forwards, repeats)
    floor = None
    if whose == "ours" and name in OF_FLOOR:
        stages = stages_of(problem.base, problem.calibration["task0"])
        work = work_of(stages, "elements", experts, OF_FLOOR[name], len(RIDGES))
        floor = 1 + price(work) / found.unit
    return SimpleNamespace(**vars(found), merged=fingerprint(of_layers(merged)), floor=floor)


def table(experts: int, repeats: int):
    """Lines for all merges of so many experts; ours beside theirs where there are both."""
    yield f"\n{experts} experts, {PICTURES} pictures each"
    yield (
        f"{'':38}{'seconds':>9}{'ratio':>7}{'wanted':>9}{'floor':>7}{'adds MiB':>10}{'wanted':>10}"
    )
    for name in OURS:
        bounds = WANTED.get(name), None
        theirs = None
        if name in PEERS:
            theirs = apart(row, name, "theirs", experts, repeats)
            yield line(f"fusion_bench {name}", theirs)
            bounds = round(theirs.ratio, 2), round(theirs.added)
        found = apart(row, name, "ours", experts, repeats)
        yield line(f"ours {name}" if theirs else name, found, *bounds)
        if theirs is not None:
            difference = (found.merged - theirs.merged).norm() / theirs.merged.norm()
            mark = "" if difference <= AGREES else " !"
            yield f"{'':6}their weights and ours differ by {difference:.1e}{mark}"


def line(label: str, found, time: float | None = None, memory: float | None = None) -> str:
    """A row of the table, with what is wanted of its time and memory."""
    floor = "" if found.floor is None else f"{found.floor:.2f}"
    return (
        f"{label:38}{found.seconds:>9.2f}{found.ratio:>7.2f}{verdict(found.ratio, time):>9}"
        f"{floor:>7}{found.added:>10.0f}{verdict(found.added, memory):>10}"
    ).rstrip()


def main() -> None:
    """Print a table for every number of experts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for experts in given.experts:
        for text in table(experts, given.repeats):
            print(text, flush=True)


if __name__ == "__main__":
    main()
