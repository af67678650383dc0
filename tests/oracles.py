"""Our methods against other people's: mergekit, peft and fusion_bench, called, never copied.
``make oracles`` runs this file.

Random tensors, a small random transformer and the suites' experts, in float64 except where an
oracle works in float32 itself.

    --quick    leave the suites out, whose experts are trained where the cache lacks them
    --freeze   write the random cases to frozen_oracles.safetensors, which test_oracles.py reads,
               and those of recipes to frozen_recipes.safetensors, for test_checkpoints_recipes.py
"""

import copy
import io
import os
import sys
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # before mergekit asks for models that are folders here

import frozen_recipes
import torch
import yaml
from frozen_oracles import Case, Problem, difference, freeze, random_tensors, random_transformer
from fusion_bench.method.dare.utils import module_random_drop_
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.slerp.slerp import slerp_on_state_dicts
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
    compute_and_sum_svd_mem_reduction,
)
from fusion_bench.method.ties_merging import ties_merging_utils
from fusion_bench.method.wudi import wudi_merging
from fusion_bench.modelpool import BaseModelPool
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from peft.utils import merge_utils
from torch import nn
from toys import loaded

from qpmerge_lite.checkpoints.merging import merge_folders
from qpmerge_lite.checkpoints.orders import ordered
from qpmerge_lite.checkpoints.recipes.reading import read_recipe
from qpmerge_lite.companion import suites

ROUNDING = (
    2**-40
)  # some thousand float64 roundings: sums, and weights that are large beside their updates
SPECTRAL = (
    2**-32
)  # singular vectors: rounding over the gaps between singular values; Adam: rounding over its 1e-8
SINGLE = 2**-20  # sixteen float32 roundings, where the oracle works in float32


def apart(update):
    """An update with entries of equal magnitude moved apart by single float32 steps: which of them
    a trim keeps, nobody promises."""
    values, order = update.abs().flatten().float().view(torch.int32).long().sort(stable=True)
    steps = torch.arange(len(order))
    bits = torch.empty_like(order).scatter_(0, order, (values - steps).cummax(0).values + steps)
    return bits.int().view(torch.float32).double().reshape(update.shape) * update.sign()


def trained(name, count=4):
    """Experts of a suite in float64, and 32 calibration inputs each."""
    suite = suites.load(name, seed=0, progress=False, tasks=suites.task_names(name)[:count])
    model = copy.deepcopy(suite.base).double()
    base = model.state_dict()
    experts = {
        t: {k: v + apart(e[k].double() - v) for k, v in base.items()}
        for t, e in suite.experts.items()
    }
    double = lambda batch: {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return Problem(
        name,
        base,
        experts,
        model,
        {t: [double(b) for b in batches] for t, batches in suite.calibration(32).items()},
    )


@contextmanager
def recorded(name):
    """First argument and answer of every call of a function of torch."""
    calls, function = [], getattr(torch, name)

    def record(*args, **options):
        calls.append((args[0], function(*args, **options)))
        return calls[-1][1]

    with patch.object(torch, name, record):
        yield calls


def beside(calls, method):
    """Numbers that make our method keep what calls of ``torch.bernoulli`` kept, each so close to
    its threshold that the probability is
    tested too: DARE keeps from ``1 - p`` on, DELLA below p."""
    bound, side = (lambda p: 1 - p, 1) if method == "dare" else (lambda p: p, -1)
    return [bound(p.double()) * (1 + side * 1e-6 * (2 * kept.double() - 1)) for p, kept in calls]


def in_order(numbers, names, experts_first):
    """Numbers drawn name by name, in each expert by expert, as ours asks for them: names sorted,
    experts outside or inside."""
    count = len(numbers) // len(names)
    drawn = {
        (k, t): numbers[i * count + t].flatten().double()
        for i, k in enumerate(names)
        for t in range(count)
    }
    return torch.cat(
        [
            drawn[key]
            for key in sorted(drawn, key=(lambda key: key[::-1]) if experts_first else None)
        ]
    )


def mergekit_cases(problem):
    """Also the normalised and weighted forms of each."""
    base, experts = problem.base, problem.experts

    def case(name, method, options, count=3, note="", names=tuple(base), **parameters):
        tasks = list(experts)[:count]
        anchor = {"linear": None, "slerp": tasks[0]}.get(name, "base")
        models = {t: {k: experts[t][k] for k in names} for t in tasks} | (
            {"base": {k: base[k] for k in names}} if anchor == "base" else {}
        )
        torch.manual_seed(0)
        with recorded("bernoulli") as calls:
            theirs = merge_state_dicts(models, name, base=anchor, parameters=parameters)
        draws = in_order(beside(calls, method), names, method == "dare") if calls else None
        return Case(
            "mergekit", method, options, tasks, theirs, note, SINGLE if calls else ROUNDING, draws
        )

    yield case("linear", "soup", {"weights": [0.5, 0.25, 0.25]}, weight=[2.0, 1.0, 1.0])
    yield case(
        "task_arithmetic",
        "task_arithmetic",
        {"scale": [0.35, 0.21, -0.14]},
        weight=[0.5, 0.3, -0.2],
        **{"lambda": 0.7},
    )
    yield case(
        "task_arithmetic",
        "task_arithmetic",
        {"scale": [0.5, 0.25, 0.25]},
        note="normalised",
        weight=[2, 1, 1],
        normalize=True,
    )
    for density, count in ((0.2, 3), (0.5, 4), (0.2, 1)):
        options = {"semantics": "mergekit", "density": density}
        yield case(
            "ties", "ties", options, count, f"{count} at {density}", weight=1.0, density=density
        )
    weights = [1.0, 0.2, -0.5]
    options = {"semantics": "mergekit", "density": 0.5, "scale": 0.7, "weights": weights}
    yield case(
        "ties", "ties", options, note="weighted", weight=weights, density=0.5, **{"lambda": 0.7}
    )
    yield case(
        "dare_linear",
        "dare",
        {"drop": 0.75, "scale": 0.5, "rescale": "l1"},
        weight=0.5,
        density=0.25,
    )
    yield case(
        "breadcrumbs",
        "breadcrumbs",
        {"density": 0.6, "outliers": 0.15, "scale": 1.0},
        weight=1.0,
        density=0.6,
        gamma=0.15,
    )
    flat = tuple(
        k for k, v in base.items() if v.dim() < 3
    )  # beyond matrices it ranks along the second axis, ours along the last
    yield case(
        "della", "della", {"density": 0.4, "rescale": "l1"}, names=flat, weight=1.0, density=0.4
    )
    yield case("slerp", "slerp", {"t": 0.3}, 2, t=0.3)
    for count in (2, 4):
        yield case("model_stock", "model_stock", {}, count, f"of {count}")


def peft_cases(problem):
    """Its functions merge lists of task vectors, tensor by tensor."""
    base = problem.base

    def case(name, method, options, count=3, note="", weights=None, **parameters):
        tasks = list(problem.experts)[:count]
        vectors, weights = problem.vectors(tasks), torch.tensor(weights or [1.0] * count)
        torch.manual_seed(0)
        with recorded("bernoulli") as calls:
            theirs = {
                k: v + getattr(merge_utils, name)([z[k] for z in vectors], weights, **parameters)
                for k, v in base.items()
            }
        draws = in_order(beside(calls, method), tuple(base), True) if calls else None
        return Case("peft", method, options, tasks, theirs, note, ROUNDING, draws)

    yield case(
        "task_arithmetic", "task_arithmetic", {"scale": [0.5, 0.3, -0.2]}, weights=[0.5, 0.3, -0.2]
    )
    for density, count in ((0.2, 3), (0.5, 4), (0.2, 1)):
        yield case(
            "ties",
            "ties",
            {"semantics": "peft", "density": density},
            count,
            f"{count} at {density}",
            density=density,
        )
    weights = [1.0, 0.2, -0.5]
    yield case(
        "ties",
        "ties",
        {"semantics": "peft", "density": 0.5, "weights": weights},
        note="weighted",
        weights=weights,
        density=0.5,
    )
    yield case("dare_linear", "dare", {"drop": 0.75, "scale": 0.5}, weights=[0.5] * 3, density=0.25)


def fusion_bench_cases(problem):
    """Its functions merge state dicts or task vectors; its TIES with a mean is the authors'."""
    base, names = problem.base, list(problem.experts)
    states, vectors = [problem.experts[t] for t in names], problem.vectors(names)
    add = lambda update, scale=1.0: {k: v + scale * update[k].detach() for k, v in base.items()}

    def case(method, options, theirs, count=3, note="", tolerance=ROUNDING, draws=None):
        return Case("fusion_bench", method, options, names[:count], theirs, note, tolerance, draws)

    yield case("soup", {}, simple_average(states[:3]))
    for semantics, how, count in (
        ("authors", "mean", 3),
        ("fusion_bench", "sum", 3),
        ("fusion_bench", "sum", 1),
    ):
        flat = torch.stack([ties_merging_utils.state_dict_to_vector(v) for v in vectors[:count]])
        update = ties_merging_utils.vector_to_state_dict(
            ties_merging_utils.ties_merging(flat, 20, how), base
        )
        yield case(
            "ties",
            {"semantics": semantics, "scale": 0.3},
            add(update, 0.3),
            count,
            f"{how} of {count}",
        )
    dropped = copy.deepcopy(vectors[:3])
    torch.manual_seed(0)
    with recorded("rand_like") as calls:
        for vector in dropped:
            module_random_drop_(vector, 0.75, rescale=True)
    drawn = [calls[t * len(base) + i][1] for i in range(len(base)) for t in range(3)]
    total = {k: sum(v[k] for v in dropped) for k in base}
    yield case("dare", {"drop": 0.75}, add(total, 0.3), draws=in_order(drawn, tuple(base), True))
    yield case("slerp", {"t": 0.3}, slerp_on_state_dicts(0.3, *states[:2]), 2)
    for count in (2, 4):
        update = compute_and_sum_svd_mem_reduction(vectors[:count], accelerator="cpu")
        yield case("tsv_merge", {}, add(update), count, f"of {count}", SPECTRAL)
    yield case("iso_c", {}, add(iso_c(vectors[:3], accelerator="cpu")), tolerance=SPECTRAL)
    yield case(
        "wudi",
        {"steps": 20},
        add(wudi_merging(vectors[:3], accelerator="cpu", iter_num=20)),
        tolerance=SPECTRAL,
    )


@torch.no_grad()
def grams(module, call, masks):
    """Mean of ``x xᵀ`` over the unmasked tokens that every dense layer reads while ``call`` runs
    one batch per mask."""
    seen = {k: [] for k, m in module.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        module.get_submodule(k).register_forward_pre_hook(lambda _, x, k=k: seen[k].append(x[0]))
        for k in seen
    ]
    call()
    for hook in hooks:
        hook.remove()
    rows = {
        k: torch.cat([x.flatten(0, -2) if m is None else x[m.bool()] for x, m in zip(xs, masks)])
        for k, xs in seen.items()
    }
    return {k: x.mT @ x / len(x) for k, x in rows.items()}


def regmean_cases(problem):
    """RegMean from Gram matrices taken by hooks; RegMean++ where nothing is padded. Its last norm
    stays the base's, ours is averaged."""
    tasks, weights = list(problem.experts), []
    for t in tasks:
        model, batches = loaded(problem.model, problem.experts[t]), problem.calibration[t]
        weights.append(
            grams(
                model,
                lambda m=model, b=batches: [m(**batch) for batch in b],
                [b.get("attention_mask") for b in batches],
            )
        )
    theirs = merging_with_regmean_weights(
        {k: [problem.experts[t][k] for t in tasks] for k in problem.base}, weights, 0.95
    )
    tolerance = 2**-48 * max(
        float(torch.linalg.cond(sum(w[k] for w in weights))) for k in weights[0]
    )  # an inverse without a ridge
    yield Case("fusion_bench", "regmean", {}, tasks, theirs, tolerance=tolerance)
    if "pixels" in problem.calibration[tasks[0]][0]:
        merged, last = plus_plus(problem), ("norm.weight", "norm.bias")
        assert all(torch.equal(merged[k], problem.base[k]) for k in last)
        theirs = {k: v for k, v in merged.items() if k not in last}
        yield Case(
            "fusion_bench", "regmean_plus_plus", {}, tasks, theirs, "up to the last norm", tolerance
        )


def plus_plus(problem):
    """fusion_bench's RegMean++ over our blocks. Its parts for CLIP are ours here: how blocks are
    called, and what comes before them."""

    def patches(model, batches):
        return [
            nn.functional.unfold(b["pixels"], model.patch, stride=model.patch).mT for b in batches
        ]

    class Blocks(RegMeanAlgorithmPlusPlus):
        get_layers = lambda self, model: model.blocks
        layer_batches_forward = lambda self, block, batches: [block(x) for x in batches]

        def get_input_for_first_layer(self, model, batches):
            return [
                torch.cat([model.cls.expand(len(x), -1, -1), model.embed(x)], 1) + model.position
                for x in patches(model, batches)
            ]

        def merge_embedding_layer(self, models_to_merge_dict):
            models = models_to_merge_dict
            rows = [
                torch.cat(patches(m, problem.calibration[t])).flatten(0, 1)
                for t, m in models.items()
            ]
            before = [k for k in problem.base if not k.startswith(("blocks.", "norm."))]
            return merging_with_regmean_weights(
                {k: [m.state_dict()[k] for m in models.values()] for k in before},
                [{"embed": x.mT @ x / len(x)} for x in rows],
                0.95,
            )

        def get_regmean_weights(self, name, block, batches_input, linear_modules_to_merge):
            return grams(
                block, lambda: [block(x) for x in batches_input], [None] * len(batches_input)
            )

        def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
            return merged_params_dict | {
                f"blocks.{layer_idx}.{k}": v for k, v in new_merged_params.items()
            }

    pool = BaseModelPool(
        {"_pretrained_": copy.deepcopy(problem.model)}
        | {t: loaded(problem.model, e) for t, e in problem.experts.items()}
    )
    pool.load_train_dataset = problem.calibration.get
    method = Blocks(
        num_regmean_examples=0,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=0.95,
        weight_transpose=True,
    )
    return method.run(pool).state_dict()


def cases(problem):
    """All cases of a problem, with versions, and without what the oracles print."""
    plain = (
        () if problem.name == "transformer" else (mergekit_cases, peft_cases, fusion_bench_cases)
    )
    for family in (*plain, *([regmean_cases] if problem.model else [])):
        torch.set_default_dtype(
            torch.float64
        )  # for constants that the oracles make, such as RegMean's α
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = list(family(problem))
        torch.set_default_dtype(torch.float32)
        for case in found:
            case.whose, case.problem = f"{case.whose} {version(case.whose)}", problem.name
            yield case


def theirs_and_ours(text):
    """What mergekit and what we make of a recipe for the folders that are here: (d,) each, in the
    order of names, which have to be the same."""
    Path("recipe.yml").write_text(text)
    LoaderCache.loaders.clear()  # it knows models by their relative paths
    options = MergeOptions(
        random_seed=0, copy_tokenizer=False, write_model_card=False, quiet=True, clone_tensors=True
    )
    with redirect_stderr(io.StringIO()):
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), "theirs", options)
    merge_folders(ordered(read_recipe(Path("recipe.yml")), Path("ours")))
    (theirs, names), (ours, same) = map(frozen_recipes.flat, (Path("theirs"), Path("ours")))
    assert names == same
    return theirs, ours


def recipe_answers():
    """(kind, title, whether many updates are alike, mergekit's answer, ours) of every recipe on
    models of every kind."""
    for kind in frozen_recipes.KINDS:
        for alike in (False, True):
            for title, text in frozen_recipes.RECIPES.items():
                if (kind, title) in frozen_recipes.NOT_A_NUMBER:
                    continue
                with TemporaryDirectory() as folder, chdir(folder):
                    models = frozen_recipes.states(kind, alike)
                    frozen_recipes.write_models(Path(), kind, models)
                    yield kind, title, alike, *theirs_and_ours(text)


def recipes(freezing) -> bool:
    """Print a line per recipe; whether any of them differs."""
    kept, differs = {}, False
    for kind, title, alike, theirs, ours in recipe_answers():
        found = frozen_recipes.apart(title, ours, theirs)
        differs |= found > 0
        verdict = "DIFFERS" if found > 0 else ""
        name = f"mergekit-yaml {title}, {'alike' if alike else 'apart'}"
        print(f"{name:57} {kind:12} {found:8.1e}  {verdict}".rstrip(), flush=True)
        if kind in frozen_recipes.FROZEN_KINDS and not alike:
            kept[kind, title] = theirs
    if freezing:
        frozen_recipes.freeze(kept)
    return differs


def main(arguments) -> bool:
    """Print a line per case; whether any of them differs by more than its tolerance."""
    random, kept, differs = [random_tensors(), random_transformer()], [], False
    for problem in random + (
        [] if "--quick" in arguments else [trained("vision"), trained("language")]
    ):
        for case in cases(problem):
            found = difference(case, problem)
            verdict = "" if found <= case.tolerance else "DIFFERS"
            differs |= bool(verdict)
            numbers = f"{found:8.1e}  allowed {case.tolerance:7.1e}"
            print(f"{case!s:57} {problem.name:12} {numbers}  {verdict}".rstrip(), flush=True)
            kept += [case] if problem in random else []
    if "--freeze" in arguments:
        freeze(random, kept)
    return recipes("--freeze" in arguments) or differs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
