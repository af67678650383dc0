"""The verbs ``merge`` and ``check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..calibration.sources import SAMPLES
from ..compatibility import Report
from ..costs import Costs, estimated, estimated_plan
from ..findings import WARNING, Finding, Refused, duration, size
from ..heads.telling import AUTO, OPTION
from ..large.budget import bytes_of
from ..large.measured import measured
from ..large.rates import Work, measured_rates
from ..large.running import TOKENS
from ..large.times import work_of, work_of_plan
from ..methods import METHODS, assignment, literal
from ..outlines import check_places
from ..output import number_of, plain
from .words import columns, named_folders, pairs, shows_progress, talks

TOLD_FROM = 10**6  # bytes; Python itself takes and gives back as much
MEMORY = "memory beside what Python and its packages take"
TIME = "time at rates measured just now, a rough guess"


def run_check(arguments) -> int:
    report, missing = check_places(
        arguments.base, named_folders(arguments.experts), arguments.heads
    )
    costs, seconds = {}, {}
    if not report.errors and (arguments.json or not arguments.quiet):
        costs = {name: estimated(report, name, {}) for name in METHODS}
        rates = _rates(report)
        for name, cost in costs.items():
            seconds[name] = work_of(report, name, {}, cost).seconds(rates)
    if arguments.json:
        estimates = {n: cost._asdict() | {"seconds": seconds[n]} for n, cost in costs.items()}
        said = report.as_json() | {"downloads": missing, "estimates": estimates}
        print(json.dumps(said, indent=1))
    else:
        _print_findings(report, arguments.quiet, missing)
        _print_costs(costs, seconds)
    return int(bool(report.errors))


def _rates(report: Report) -> Work:
    """Rates of this machine, and of reading the base's largest file where it is here."""
    headers = report.base.headers.values()
    path = max(headers, key=lambda header: header.size).path
    return measured_rates(path if path.is_file() else None)


def _print_findings(report: Report, only_errors: bool, missing: int) -> None:
    for finding in report.errors if only_errors else report.findings:
        print(finding, file=sys.stderr if only_errors else sys.stdout)
    if not only_errors:
        counts = f"{len(report.errors)} errors, {len(report.at(WARNING))} warnings"
        print(
            f"{counts}; {len(report.base.entries)} tensors, {report.parameters:,} numbers; "
            f"a merge reads {size(report.bytes)} of weights"
            + (f" and downloads {size(missing)} of them first" if missing else "")
        )


def _print_costs(costs: dict[str, Costs], seconds: dict[str, float]) -> None:
    """A table of what every method would cost."""
    if costs:
        titles = [f"{title:>8}" for title in ("memory", "read", "written", "time")]
        print(f"\n{'method':<18} {' '.join(titles)}  sees at once")
    for name, cost in costs.items():
        sizes = [size(count) for count in (cost.memory, cost.read, cost.written)]
        cells = [f"{cell:>8}" for cell in (*sizes, duration(seconds[name]))]
        print(f"{name:<18} {' '.join(cells)}  {cost.at_once}")
    if costs:
        inputs = f"{SAMPLES} inputs of {TOKENS} tokens for every expert"
        print(f"{MEMORY}; {TIME}, and with {inputs} where a method takes them")


def run_merge(arguments) -> int:
    from ..merging import carry_out, silent, take_part
    from ..planning import plan_of

    order, party = _order(arguments), arguments.party
    if party.number > 0:
        take_part(order, party.group)
        return 0
    shows = shows_progress(arguments)
    plan = plan_of(order, progress=shows, group=party.group)
    if talks(arguments) and party.count > plan.processes:
        _say(f"one of the {party.count} processes makes this merge: it runs no model")
    estimate, seconds = estimated_plan(plan), None
    if talks(arguments) or arguments.json:
        seconds = work_of_plan(plan, estimate).seconds(_rates(plan.report))
    if talks(arguments):
        of_each = f", in each of {plan.processes} processes" if plan.processes > 1 else ""
        print(
            f"estimated: {size(estimate.memory)} of memory, reads {size(estimate.read)}, writes "
            f"{size(estimate.written)}, time: {duration(seconds)} ({MEMORY}{of_each}; {TIME})",
            flush=True,
        )
    with measured() as found:
        say = silent if arguments.quiet else _say
        manifest = carry_out(plan, progress=shows, say=say)
    if arguments.json:
        costs = {"estimated": estimate._asdict() | {"seconds": seconds}, "measured": found}
        told = {"out": str(order.out), "costs": costs} | manifest
        print(json.dumps(plain(told), indent=1))
    elif talks(arguments):
        _tell(order.out, manifest, found, seconds)
    return 0


def _order(arguments):
    """What is to be merged, by a recipe or by the command line."""
    from ..orders import Order, ordered
    from ..recipes.reading import read_recipe

    if arguments.config is not None:
        _refuse_beside_recipe(arguments)
        recipe, seed = read_recipe(arguments.config), arguments.random_seed or 0
        return ordered(recipe, arguments.out, seed, _memory(arguments))
    if arguments.random_seed is not None:
        cure = "write --option seed=N for a method of that option"
        raise Refused("--random-seed", "it beside --config", "it without", cure)
    calibration = pairs(arguments.calibration, "--calibration", "french=french.jsonl")
    options = pairs(arguments.option, "--option", "density=0.1")
    moments: dict[str, list[Path]] = {}
    for word in arguments.moments:
        name, file = assignment(word, "--moments", "french=french.safetensors")
        moments.setdefault(name, []).append(Path(file))
    return Order(
        base=arguments.base,
        experts=named_folders(arguments.experts),
        out=arguments.out,
        method=arguments.method,
        calibration=dict(calibration),
        columns=columns(arguments.column),
        moments=moments,
        options={name: literal(value) for name, value in options.items()},
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        heads=arguments.heads,
        memory=_memory(arguments),
    )


def _memory(arguments) -> int | None:
    """Bytes that the process may take, None where nothing is said of them."""
    return None if arguments.memory is None else bytes_of(arguments.memory)


def _refuse_beside_recipe(arguments) -> None:
    """Refused where the command line says what a recipe says."""
    given = {
        "BASE": arguments.base,
        "EXPERT": arguments.experts,
        "--method": arguments.method,
        "--calibration": arguments.calibration,
        "--column": arguments.column,
        "--moments": arguments.moments,
        "--option": arguments.option,
        OPTION: None if arguments.heads == AUTO else arguments.heads,
    }
    for name, value in given.items():
        if value:
            cure = "leave it out and write it into the recipe, or leave out --config"
            raise Refused(name, "none beside --config, which says it all", f"{value}", cure)


def _say(line: str) -> None:
    print(f"qpmerge: {line}", file=sys.stderr)


def _tell(out: Path, manifest: dict, found: dict, seconds: float) -> None:
    """What was made, in a few lines."""
    print(f"method: {manifest['method']} ({manifest['why']})")
    if manifest["choice"]:
        print(f"chosen: {manifest['choice']['chosen']}")
    for name, given in manifest["calibration"].items():
        print(f"calibration of {name}: {given['inputs']} of {given['of']:,} inputs")
    for note in manifest["notes"]:
        print(f"note: {note}")
    for warning in manifest["warnings"]:
        print(f"warning: {Finding(**warning).message}")
    if manifest["table"]:
        print(f"layers merged: {len(manifest['table'])}")
    for reason, names in manifest["averaged"].items():
        print(f"averaged: {number_of(len(names), 'tensor')}, {reason}")
    for head in manifest["heads"].values():
        print(f"head kept: {head['file']}, {head['class']}")
    if manifest["kept"]:
        kept = number_of(len(manifest["kept"]), "tensor")
        print(f"not merged: {kept}, as the base has them")
    grown = size(found["memory"]) if found["memory"] >= TOLD_FROM else "less than 1 MB"
    print(
        f"measured: {grown} of memory, {size(found['own'])} with Python and its packages, "
        f"{size(found['peak'])} with files that were read too; {found['seconds']:.1f} s, where "
        f"{duration(seconds)} had been estimated"
    )
    print(f"written: {out}")
