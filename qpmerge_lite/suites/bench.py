"""`python -m qpmerge_lite.suites.bench`: the sequential merge in units of the forward passes it cannot avoid.

Unavoidable are one run of every expert over its own calibration inputs and one run of the merged model over all of them.
Timings of one machine are noisy: both sides run in turn, and the median of the ratios is printed. Every row is a process of its
own, because the peak of a process's memory never falls.
"""
import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import torch
from torch.func import functional_call

from .. import qp
from .models import VisionTransformer


def problem(width: int, depth: int, experts: int, images: int, device):
    """A random vision transformer, its perturbed copies as experts, and calibration images."""
    torch.manual_seed(0)
    base = VisionTransformer(width=width, depth=depth).to(device).eval()
    states = {f"task{k}": {n: v + 0.01 * torch.randn_like(v) for n, v in base.state_dict().items()} for k in range(experts)}
    batches = {t: list({"pixels": x} for x in torch.randn(images, 1, 28, 28, device=device).split(64)) for t in states}
    return base, states, batches


def clock(device, run) -> float:
    """Wall seconds of a call, device work included."""
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


@torch.no_grad()
def forwards(base, states, batches) -> None:
    """The unavoidable passes: every batch through its expert, and through one other model."""
    for task, state in states.items():
        for batch in batches[task]:
            functional_call(base, state, (), batch)
            base(**batch)


def row(width: int, depth: int, basis: str, repeats: int, device) -> str:
    """One line of the table: median seconds of both sides, median ratio, and the peak memory of the process (on CUDA, of the device)."""
    base, states, batches = problem(width, depth, 8, 128, device)
    forwards(base, states, batches)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    pairs = []
    for _ in range(repeats):
        pairs.append((clock(device, lambda: qp(base, states, batches, basis=basis)),
                      clock(device, lambda: forwards(base, states, batches))))
    merge, passes = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, KiB elsewhere
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else resident
    return f"{width:>6}{depth:>6}{basis:>17}{merge:>9.2f}{passes:>11.2f}{ratio:>7.1f}{peak:>10.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"device {args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'width':>6}{'depth':>6}{'basis':>17}{'merge s':>9}{'forwards s':>11}{'ratio':>7}{'peak MiB':>10}")
    cells = [(*size, basis) for size in ((96, 4), (96, 8), (192, 4)) for basis in ("rows", "rotated_columns", "elements")]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for cell in cells:
            print(pool.apply(row, (*cell, args.repeats, args.device)), flush=True)


if __name__ == "__main__":
    main()
