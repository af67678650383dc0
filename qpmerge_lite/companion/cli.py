"""`qpmerge`: merge checkpoints; run, check and judge the book; list, fetch, verify and pin its
data."""

import argparse
import ast
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial

from ..checkpoints.arguments import add_verbs
from ..checkpoints.commands.running import run_command
from ..checkpoints.completion.scripts import add_completion
from ..errors import MergeError
from .book import claim_pages, claims, expected, run
from .paths import repository
from .plans import DATA_TIERS, PLANS
from .records import keep

TIERS = tuple(PLANS)  # of runs, under whose names records are filed


def main(argv=None):
    """Entry point of the console script. Returns the exit status: 0 done, 1 refused or failed, 2
    wrong usage."""
    return run_command(parser(), argv)


def parser():
    """The command line as an ``argparse`` parser."""
    top = argparse.ArgumentParser(prog="qpmerge", description=__doc__)
    groups = top.add_subparsers(required=True)
    add_verbs(groups)
    add_completion(top, groups)
    verbs = groups.add_parser("book", help="the executable book").add_subparsers(
        required=True, metavar="VERB"
    )
    run = _verb(verbs, "run", _run, "execute the notebooks whose content changed")
    check = _verb(
        verbs,
        "check",
        _check,
        "execute all notebooks again and compare their records with the expected ones",
    )
    check.add_argument(
        "--update", action="store_true", help="first write the fresh values as the expected ones"
    )
    check.add_argument("--no-run", action="store_true", help="compare the records that are there")
    table = _verb(verbs, "claims", _claims, "judge every claim and rewrite the table of README.md")
    evidence = _verb(
        verbs,
        "evidence",
        _evidence,
        "measure the rows of many seeds that the chapters rest on, to be committed",
    )
    evidence.add_argument(
        "--shard", metavar="I/N", default="1/1", help="the I-th of N parts, for as many machines"
    )
    evidence.add_argument(
        "--tier",
        choices=("full", "standard"),
        default="full",
        help="of the embedded suites, or of the public data sets (default full)",
    )
    evidence.add_argument("--only", metavar="EXPERIMENT", help="only units of this experiment")
    evidence.add_argument("--device", default="cpu", help="where to run (default cpu)")
    evidence.add_argument("--force", action="store_true", help="also what is there and current")
    evidence.add_argument("--list", action="store_true", help="name the units that are to be run")
    record = _verb(
        verbs,
        "record",
        _record,
        "keep the records of a tier that the build machine does not run, to be committed",
    )
    record.add_argument("--tier", choices=TIERS[1:], default="standard")
    for command in (run, check):
        command.add_argument("--only", metavar="NN", help="only notebooks whose name starts so")
        command.add_argument(
            "-p",
            dest="parameters",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help="set a notebook parameter",
        )
    run.add_argument("--force", action="store_true", help="execute even what has not changed")
    for command in (run, check, table):
        command.add_argument("--tier", choices=TIERS, default="smoke")
    data = groups.add_parser("data", help="the data behind the suites").add_subparsers(
        required=True, metavar="VERB"
    )
    _verb(data, "list", _data_list, "every manifest with its source, licence and size")
    verbs = {
        "fetch": (
            _data_fetch,
            "+",
            "bring files here from the first source that serves, and check them",
        ),
        "verify": (
            _data_verify,
            "*",
            "check the bytes and hashes of what is here, without a network; default all",
        ),
        "lock": (
            _data_lock,
            "+",
            "ask the Hub for commits, hash the files, and write what was found into the manifests",
        ),
    }
    for name, (command, count, help) in verbs.items():
        _verb(data, name, command, help).add_argument(
            "name", nargs=count, help="manifests, or a data tier for all of its"
        )
    return top


def _verb(group, name, command, help):
    verb = group.add_parser(name, help=help, description=help)
    verb.add_argument("--quiet", action="store_true", help="print only what went wrong")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.set_defaults(command=command)
    return verb


def _run(arguments, force=None):
    say = _printer(arguments)
    outcomes = run.run(
        tier=arguments.tier,
        only=arguments.only,
        force=arguments.force if force is None else force,
        parameters=dict(_assignment(text) for text in arguments.parameters),
        progress=not (arguments.quiet or arguments.json) and sys.stderr.isatty(),
        report=say,
    )
    for outcome in outcomes:
        if outcome.status == "failed":
            path = os.path.relpath(outcome.path)
            print(
                f"{outcome.notebook} failed with {outcome.error}; kept with its error as {path}",
                file=sys.stderr,
            )
    if arguments.json and arguments.command is _run:
        print(
            json.dumps([asdict(o) | {"path": os.path.relpath(o.path)} for o in outcomes], indent=1)
        )
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _check(arguments):
    if not arguments.no_run and _run(arguments, force=True):
        return 1
    say = _printer(arguments)
    if arguments.update:
        for path in expected.update(arguments.tier, only=arguments.only):
            say(f"wrote {os.path.relpath(path)}")
    findings = expected.compare(arguments.tier, only=arguments.only)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.notebook}: {finding.id}: {finding.problem}", file=sys.stderr)
        say(f"records outside tests/expected/{arguments.tier}: {len(findings)}")
    return int(bool(findings))


def _evidence(arguments):
    from .evidence import studies

    shard = _shard(arguments.shard)
    known = [study.measure.__name__ for study in studies.STUDIES]
    if arguments.only not in (None, *known):
        raise MergeError(f"--only: expected one of {', '.join(known)}, found {arguments.only!r}")
    say = _printer(arguments)
    if arguments.list:
        every = studies.units(arguments.only, shard, arguments.tier)
        reasons = {str(unit): unit.why_due() for unit in every}
        due = {n: reason or "current" for n, reason in reasons.items() if reason or arguments.force}
        for name, reason in due.items():
            say(f"{name}: {reason}")
        say(f"{len(due)} of {len(every)} units are to be measured")
        return _done(arguments, due)
    due = studies.due(arguments.only, shard, arguments.force, arguments.tier)
    for unit in due:
        started = time.monotonic()
        unit.run(arguments.device)
        say(f"{unit}: {time.monotonic() - started:.0f} s")
    return _done(arguments, [str(unit) for unit in due])


def _shard(text):
    """``I/N`` as a pair of numbers."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise MergeError(f"--shard: expected I/N with 1 <= I <= N, such as 2/8, found {text!r}")
    return int(number), int(count)


def _record(arguments):
    written = [os.path.relpath(path) for path in keep(arguments.tier)]
    say = _printer(arguments)
    for path in written:
        say(f"wrote {path}")
    return _done(arguments, written)


def _claims(arguments):
    root = repository()
    rows = claims.rows(root, arguments.tier)
    readme = root / "README.md"

    def link(chapter):
        return f"[{chapter}](notebooks/{chapter}.ipynb)"

    text = claim_pages.replace_between_markers(
        readme.read_text(encoding="utf-8"), claim_pages.summary(rows, link)
    )
    partial = readme.with_name(".README.md.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, readme)
    say = _printer(arguments)
    for row in rows:
        say(f"{row.claim.id}: {row.verdict}")
    return _done(
        arguments,
        [{"id": r.claim.id, "measured": r.measured, "verdict": r.verdict} for r in rows],
    )


def _data_list(arguments):
    from .data import manifests

    def total(files):
        sizes = [file.bytes for file in files]
        return None if None in sizes else sum(sizes)

    sources = [
        {
            "manifest": name,
            "source": s.id,
            "kind": s.kind,
            "licence": s.licence,
            "verified": s.verified,
            "bytes": total(s.files),
        }
        for name in manifests.names()
        for s in manifests.load_manifest(name).sources
    ]
    say = _printer(arguments)
    for s in sources:
        size = "size not known" if s["bytes"] is None else f"{s['bytes']:,} bytes"
        doubt = "" if s["verified"] else ", not verified"
        say(f"{s['manifest']}: {s['source']} ({s['kind']}, {s['licence']}): {size}{doubt}")
    return _done(arguments, sources)


def _data_verify(arguments):
    from . import data
    from .data import manifests

    say, checked = _printer(arguments), {}
    for name in _manifests(arguments.name or manifests.names()):
        manifest = manifests.load_manifest(name)
        if manifest.kind == "suite":
            manifests.verify(manifest)
            here = {source.id: source.files for source in manifest.sources}
        else:
            here = data.here(manifest)
            if not here and name in arguments.name:
                raise MergeError(
                    f"{name}: none of its sources is on this machine; run: qpmerge data fetch "
                    f"{name}"
                )
        checked[name] = [
            f"{source}/{file.path}" for source, files in here.items() for file in files
        ]
        say(
            f"{name}: {len(checked[name])} files verified"
            if here
            else f"{name}: not on this machine"
        )
    return _done(arguments, checked)


def _data_fetch(arguments):
    from . import data
    from .data import manifests

    say, fetched = _printer(arguments), {}
    for name in _manifests(arguments.name):
        own, family = name in manifests.names(), manifests.load_manifest(name.partition("/")[0])
        for member in data.members(family) if own else [name]:
            files = data.fetch(member)
            fetched[member] = {path: str(cached) for path, cached in files.items()}
            folder = os.path.commonpath([cached.parent for cached in files.values()])
            say(f"{member}: {len(files)} files in {folder}")
    return _done(arguments, fetched)


def _data_lock(arguments):
    from .data import hub

    say, locked = _printer(arguments), {}
    for name in _manifests(arguments.name):
        locked[name] = hub.lock(name)
        say(
            f"{name}: "
            + (
                ", ".join(f"{source} at {commit}" for source, commit in locked[name].items())
                or "nothing to lock"
            )
        )
    return _done(arguments, locked)


def _manifests(words):
    """Names of manifests; the name of a data tier stands for all of its."""
    from .data import manifests

    return [
        name for word in words for name in (manifests.names(word) if word in DATA_TIERS else [word])
    ]


def _assignment(text):
    """``name=value`` as a pair; the value is a Python literal, or else a word."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise MergeError(f"-p {text}: expected NAME=VALUE, for example -p seed=1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _done(arguments, result):
    """Print the result where JSON is asked for; exit status 0."""
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 0


def _printer(arguments):
    if arguments.quiet or arguments.json:
        return lambda text: None
    return partial(print, flush=True)  # a log has every line as soon as a terminal does


if __name__ == "__main__":
    sys.exit(main())
