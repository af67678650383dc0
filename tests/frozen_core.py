"""The frozen values of the core, recomputed exactly: rational arithmetic over single samples, no
tensor, no package.

The problem has two experts, two outputs, two inputs and integer samples. For a list of basis
elements the normal equations are summed sample by sample and solved by Gaussian elimination on
fractions. Rewrite the table on purpose only: ``python tests/frozen_core.py``.
"""

import json
from fractions import Fraction
from pathlib import Path

TABLE = Path(__file__).with_name("frozen_core.json")
UPDATES = [[[2, -1], [0, 3]], [[1, 1], [-2, 1]]]
X = [[[1, 2], [0, 1], [-1, 3]], [[2, -1], [1, 1]]]
R = [[[1, 5], [-1, 4], [-4, 8]], [[1, -4], [3, 0]]]


def families():
    """Elements of each family, in the order of its coefficients."""
    masks = {"rows": [[[1, 1], [0, 0]], [[0, 0], [1, 1]]], "layer": [[[1, 1], [1, 1]]]}
    masked = lambda D, mask: [[d * u for d, u in zip(*rows)] for rows in zip(D, mask)]
    out = {
        name: [masked(D, mask) for mask in parts for D in UPDATES] for name, parts in masks.items()
    }
    out["columns"] = [
        masked(D, mask) for D in UPDATES for mask in ([[1, 0], [1, 0]], [[0, 1], [0, 1]])
    ]
    out["elements"] = [
        [[int((i, j) == (r, c)) for j in range(2)] for i in range(2)]
        for r in range(2)
        for c in range(2)
    ]
    return out


def solve(H, f):
    """``H d = -f`` by Gaussian elimination with exact pivots."""
    rows = [[*h, -v] for h, v in zip(H, f)]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        rows = [
            row if r == i else [a - row[i] * b for a, b in zip(row, rows[i])]
            for r, row in enumerate(rows)
        ]
    return [row[-1] for row in rows]


def answer(elements, weights):
    """Coefficients and captured energy of one programme, as fractions."""
    apply = lambda B, x: [sum(b * v for b, v in zip(row, x)) for row in B]
    dot = lambda a, b: sum(u * v for u, v in zip(a, b))
    omega = [Fraction(1, len(r) if weights == "tokens" else sum(dot(v, v) for v in r)) for r in R]
    samples = [
        (w, [apply(B, x) for B in elements], r)
        for w, xs, rs in zip(omega, X, R)
        for x, r in zip(xs, rs)
    ]
    energy = sum(w * dot(r, r) for w, _, r in samples) / 2
    H = [
        [sum(w * dot(z[i], z[j]) for w, z, _ in samples) for j in range(len(elements))]
        for i in range(len(elements))
    ]
    f = [-sum(w * dot(z[i], r) for w, z, r in samples) for i in range(len(elements))]
    d = solve(H, f)
    return {
        "d": [str(v) for v in d],
        "captured": str(-dot(f, d) / (2 * energy)),
        "energy": str(energy),
    }


def table():
    return {
        weights: {name: answer(elements, weights) for name, elements in families().items()}
        for weights in ("tokens", "energy")
    }


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
