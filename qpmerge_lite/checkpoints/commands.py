"""What the verbs ``merge``, ``check``, ``moments``, ``delta`` and ``diagnose`` do with their
arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import MergeError
from .compatibility import Report
from .costs import Costs, estimated, estimated_plan
from .deltas.reading import behind
from .findings import WARNING, Finding, Refused, size
from .hub import check_places, reference_of
from .large.measured import measured
from .methods import METHODS, assignment, literal
from .processes.joining import Party, launch_of, silent_unless_first
from .stops import Terminated, status_of, told_to_stop

MEMORY = "memory beside what Python and its packages take"


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse a command line, by default that of the process, and run the ``command`` that it sets.

    Of several processes that a launcher has started, all run a merge, and the first alone runs
    everything else; it alone prints, and all end alike.

    Returns: the exit status: 0 done, 1 refused or failed, 130 or 143 stopped; ``argparse`` leaves
        with 2 at wrong usage.
    """
    launch = launch_of(os.environ)
    with silent_unless_first(launch):
        parsed = parser.parse_args(arguments)
        parsed.party = Party(launch)
        return _status(parsed)


def _status(parsed) -> int:
    """Run the command of a command line; its exit status."""
    party = parsed.party
    try:
        with told_to_stop():
            party.join()
            has_work = party.number == 0 or parsed.command is run_merge
            return party.ended(parsed.command(parsed) if has_work else 0)
    except MergeError as error:
        party.tell(_with_notes(f"qpmerge: {error}", error))
        return 1
    except KeyboardInterrupt as stop:
        if party.count > 1 and isinstance(stop, Terminated):
            stop.add_note("launchers such as torchrun end all processes where one is lost")
        if party.number == 0 or isinstance(stop, Terminated):  # Ctrl-C comes to all
            party.tell(_with_notes("qpmerge: stopped", stop))
        return status_of(stop)
    finally:
        party.leave()  # the others see it, and should be told why before


def _with_notes(words: str, error: BaseException) -> str:
    """What is said of an error, with what was kept."""
    return "; ".join([words, *getattr(error, "__notes__", [])])


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Experts of the command line: name -> folder, in their order.

    Args:
        words: folders or references, which give their own name, or ``NAME=FOLDER``.
    Raises: Refused for a name that is there twice.
    """
    experts: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        is_bare = behind(word) is not None or "/" in name or Path(word).exists()
        if is_bare or not (equals and name and place):
            name, place = _own_name(word), word
        if name in experts:
            expected = "experts with names of their own"
            cure = "give names, such as first=FOLDER second=FOLDER"
            raise Refused(f"expert {name!r}", expected, "two of that name", cure)
        experts[name] = Path(place)
    return experts


def _own_name(word: str) -> str:
    """What an expert is called that was not given a name."""
    differences = behind(word)
    reference = reference_of(differences or word)
    if reference:
        return reference.name
    return Path(word).resolve().name if differences is None else differences.resolve().stem


def _pairs(words: Sequence[str], option: str, example: str) -> dict[str, str]:
    """``NAME=VALUE`` of an option that may be there several times."""
    pairs: dict[str, str] = {}
    for word in words:
        name, value = assignment(word, option, example)
        if name in pairs:
            raise Refused(option, f"{name!r} once", "it twice", "leave one of them out")
        pairs[name] = value
    return pairs


def run_check(arguments) -> int:
    report, missing = check_places(arguments.base, named_folders(arguments.experts))
    costs = {} if report.errors else {name: estimated(report, name, {}) for name in METHODS}
    if arguments.json:
        estimates = {name: cost._asdict() for name, cost in costs.items()}
        said = report.as_json() | {"downloads": missing, "estimates": estimates}
        print(json.dumps(said, indent=1))
    else:
        _print_findings(report, arguments.quiet, missing)
        if not arguments.quiet:
            _print_costs(costs)
    return int(bool(report.errors))


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


def _print_costs(costs: dict[str, Costs]) -> None:
    """A table of what every method would cost."""
    if costs:
        print(f"\n{'method':<18} {'memory':>8} {'read':>8} {'written':>8}  sees at once")
    for name, cost in costs.items():
        sizes = [f"{size(count):>8}" for count in (cost.memory, cost.read, cost.written)]
        print(f"{name:<18} {' '.join(sizes)}  {cost.at_once}")
    if costs:
        print(f"{MEMORY}; a merge shows the time that is left")


def run_merge(arguments) -> int:
    from .merging import carry_out, silent, take_part
    from .planning import plan_of

    order, party = _order(arguments), arguments.party
    if party.number > 0:
        take_part(order, party.group)
        return 0
    talks = not (arguments.quiet or arguments.json)
    shows = talks and sys.stderr.isatty()
    plan = plan_of(order, progress=shows, group=party.group)
    if talks and party.count > plan.processes:
        _say(f"one of the {party.count} processes makes this merge: it runs no model")
    estimate = estimated_plan(plan)
    if talks:
        of_each = f", in each of {plan.processes} processes" if plan.processes > 1 else ""
        print(
            f"estimated: {size(estimate.memory)} of memory, reads {size(estimate.read)}, writes "
            f"{size(estimate.written)} ({MEMORY}{of_each})",
            flush=True,
        )
    with measured() as found:
        say = silent if arguments.quiet else _say
        manifest = carry_out(plan, progress=shows, say=say)
    if arguments.json:
        from .output import plain

        costs = {"estimated": estimate._asdict(), "measured": found}
        told = {"out": str(order.out), "costs": costs} | manifest
        print(json.dumps(plain(told), indent=1))
    elif talks:
        _tell(order.out, manifest, found)
    return 0


def run_moments(arguments) -> int:
    from .moments.measuring import Measurement, measure

    order = Measurement(
        model=arguments.model,
        calibration=arguments.calibration,
        out=arguments.out,
        fields=arguments.column.split(",") if arguments.column else [],
        folds=arguments.folds,
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
    )
    talks = not (arguments.quiet or arguments.json)
    about = measure(order, progress=talks and sys.stderr.isatty())
    if arguments.json:
        print(json.dumps({"out": str(order.out)} | about, indent=1))
    elif talks:
        count, folds = about["calibration"]["inputs"], about["folds"]
        print(f"measured: {about['layers']} layers on {count} inputs in {folds} folds")
        print(f"written: {order.out}, {size(order.out.stat().st_size)}")
    return 0


def run_delta(arguments) -> int:
    from .deltas.writing import Difference, write_difference

    order = Difference(arguments.base, arguments.expert, arguments.out, arguments.dtype)
    talks = not (arguments.quiet or arguments.json)
    told = write_difference(order, progress=talks and sys.stderr.isatty())
    if arguments.json:
        print(json.dumps({"out": str(order.out)} | told, indent=1))
    elif talks:
        of = told["differences"] + told["unchanged"]
        print(f"differences: {told['differences']} of {of} tensors")
        count, tensors = sum(told["inexact"].values()), len(told["inexact"])
        exactly = "bit for bit" if not count else f"but for {count:,} numbers in {tensors} tensors"
        print(f"base and differences give the expert back, {exactly}")
        print(f"written: {order.out}, {size(order.out.stat().st_size)}")
    return 0


def _order(arguments):
    """What is to be merged, by a recipe or by the command line."""
    from .orders import Order, ordered
    from .recipes.reading import read_recipe

    if arguments.config is not None:
        _refuse_beside_recipe(arguments)
        return ordered(read_recipe(arguments.config), arguments.out, arguments.random_seed or 0)
    if arguments.random_seed is not None:
        cure = "write --option seed=N for a method of that option"
        raise Refused("--random-seed", "it beside --config", "it without", cure)
    calibration = _pairs(arguments.calibration, "--calibration", "french=french.jsonl")
    columns = _pairs(arguments.column, "--column", "french=sentence")
    options = _pairs(arguments.option, "--option", "density=0.1")
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
        columns={name: fields.split(",") for name, fields in columns.items()},
        moments=moments,
        options={name: literal(value) for name, value in options.items()},
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
    )


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
    }
    for name, value in given.items():
        if value:
            cure = "leave it out and write it into the recipe, or leave out --config"
            raise Refused(name, "none beside --config, which says it all", f"{value}", cure)


def _say(line: str) -> None:
    print(f"qpmerge: {line}", file=sys.stderr)


def _tell(out: Path, manifest: dict, found: dict) -> None:
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
        print(f"averaged: {len(names)} tensors, {reason}")
    print(
        f"measured: {size(found['memory'])} of memory, {size(found['peak'])} with Python and its "
        f"packages; {found['seconds']:.1f} s"
    )
    print(f"written: {out}")


def run_diagnose(arguments) -> int:
    from .diagnosis.page import check_report, write_page

    calibration = _pairs(arguments.calibration, "--calibration", "french=french.jsonl")
    columns = _pairs(arguments.column, "--column", "french=sentence")
    experts = named_folders(arguments.experts)
    if arguments.report is not None:
        check_report(arguments.report, [arguments.merged, arguments.base, *experts.values()])

    from .diagnosis.diagnosing import Question, diagnose_folders
    from .diagnosis.summary import as_text
    from .output import plain

    question = Question(
        merged=arguments.merged,
        base=arguments.base,
        experts=experts,
        calibration=dict(calibration),
        columns={name: fields.split(",") for name, fields in columns.items()},
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
    )
    talks = not (arguments.quiet or arguments.json)
    diagnosis = diagnose_folders(question, progress=talks and sys.stderr.isatty())
    if arguments.report is not None:
        write_page(arguments.report, diagnosis)
    if arguments.json:
        print(json.dumps(plain(diagnosis), indent=1))
    elif talks:
        print(as_text(diagnosis))
        if arguments.report is not None:
            print(f"written: {arguments.report}")
    return 0
