"""All merges of a suite, one layer or many, with their captured energies and their accuracy: what the diagnostic is judged on."""
from __future__ import annotations

from .compare import NEIGHBOURS

ENERGIES = ("in_sample", "disjoint")
HEURISTIC, NEIGHBOUR, PROGRAMME = "heuristics", "neighbours", "programme"


def _kind(method: str) -> str:
    return PROGRAMME if method.startswith("qp_") else NEIGHBOUR if method in NEIGHBOURS else HEURISTIC


def one_layer(results: list[dict]):
    """Merges of ``single.results`` as a ``pandas.DataFrame``: a row per method and problem, energies in closed form."""
    import pandas as pd

    return pd.DataFrame([{"suite": r["suite"], "problem": f"{r['suite']} {r['layer']} {r['seed']}", "layer": r["layer"], "seed": r["seed"],
                          "method": m["method"], "label": m["label"], "kind": _kind(m["method"]), "accuracy": m["normalised"]["mean"],
                          "validation": m["validation"], **m["captured"]}
                         for r in results for m in r["methods"] if "captured" in m])


def many_layers(name: str, results: list[dict], energy: str):
    """Merges of ``compare.compare`` likewise; ``energy`` is ``layers`` (their mean) or ``output`` (end to end)."""
    import pandas as pd

    return pd.DataFrame([{"suite": name, "problem": f"{name} {r['seed']}", "seed": r["seed"], "method": r["method"], "label": r["label"],
                          "kind": _kind(r["method"]), "accuracy": r["normalised"]["mean"], "validation": r["validation"],
                          **{where: r["captured"][where][energy] for where in ENERGIES}}
                         for r in results if "captured" in r])


def rank_correlation(frame, energy: str, draws: int, seed: int, within: bool) -> tuple[float, tuple[float, float]]:
    """Spearman's ρ of captured energy and normalised accuracy with a 95 % interval, the base left out, problems resampled whole (of one
    problem, its merges).

    Args:
        energy: a column of the frame. draws: bootstrap samples.
        within: correlate inside every problem and average, so that only methods are compared; else pool all merges.
    """
    import numpy as np
    from scipy.stats import rankdata

    merges = frame[frame.method != "base"]
    pairs = [group[[energy, "accuracy"]].to_numpy() for _, group in merges.groupby("problem")]

    def spearman(xy):
        return np.corrcoef(rankdata(xy[:, 0]), rankdata(xy[:, 1]))[0, 1]

    inside = np.array([spearman(xy) for xy in pairs])
    value = lambda chosen: inside[chosen].mean() if within else spearman(np.concatenate([pairs[i] for i in chosen]))
    generator, everything = np.random.default_rng(seed), np.arange(len(pairs))
    found = [value(generator.choice(everything, len(everything))) for _ in range(draws)] if len(pairs) > 1 else [
        spearman(pairs[0][generator.choice(len(pairs[0]), len(pairs[0]))]) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(value(everything)), (float(low), float(high))
