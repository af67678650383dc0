"""The verbs of the command line and what each of them takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .calibration.sources import SAMPLES
from .commands.measuring import run_delta, run_diagnose, run_evaluate, run_moments
from .commands.merging import run_check, run_merge
from .headers import NAMES
from .heads.telling import AUTO, OPTION, WISHES
from .manuals import (
    CHECK,
    CHECK_MORE,
    DELTA,
    DELTA_MORE,
    DIAGNOSE,
    DIAGNOSE_MORE,
    EVALUATE,
    EVALUATE_MORE,
    MERGE,
    MERGE_MORE,
    MOMENTS,
    MOMENTS_MORE,
)

FOLDER_OF_BASE = "folder of the base, or hf:owner/name"


def add_verbs(groups) -> None:
    """Add the verbs to the subcommands of an ``argparse`` parser; what is parsed has their function
    as ``command``."""
    merge, folders = _verb(
        groups, "merge", run_merge, "merge checkpoints into one", MERGE, MERGE_MORE
    )
    merge.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder to make; not there, or empty"
    )
    merge.add_argument(
        "--method",
        metavar="NAME",
        help="how to merge; by default auto with --calibration, qp over single entries with "
        "--moments, and soup without",
    )
    _add_calibration(merge)
    merge.add_argument(
        "--moments",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what qpmerge moments has measured of the expert of that name, in place of its texts; "
        "once for every expert, or several times to add files up",
    )
    merge.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the method, such as density=0.1 or weights=[0.7,0.3]",
    )
    merge.add_argument(
        "--config",
        action=_Config,
        folders=folders,
        type=Path,
        metavar="RECIPE",
        help="YAML of mergekit, in place of BASE, EXPERT, --method and --option",
    )
    merge.add_argument(
        "--random-seed",
        type=int,
        metavar="N",
        help="of a recipe's dare and della, as in mergekit (default 0)",
    )
    merge.add_argument(
        "--memory",
        metavar="SIZE",
        help="that the process may take, such as 8GB; forwards then run blocks again rather than "
        "hold more, and a merge that needs more in any case is refused",
    )
    _add_heads(merge)
    check, _ = _verb(
        groups, "check", run_check, "say whether checkpoints can be merged", CHECK, CHECK_MORE
    )
    _add_heads(check)
    _add_moments(groups)
    _add_delta(groups)
    diagnose, _ = _verb(
        groups,
        "diagnose",
        run_diagnose,
        "say what a merge does to every expert",
        DIAGNOSE,
        DIAGNOSE_MORE,
        before={"merged": "folder of the merge"},
    )
    _add_calibration(diagnose)
    diagnose.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write a page with charts, in the place of FILE",
    )
    _add_evaluate(groups)


def _add_evaluate(groups) -> None:
    """Add ``evaluate`` to the subcommands of an ``argparse`` parser."""
    verb = add_verb(
        groups,
        "evaluate",
        run_evaluate,
        "say how well merges, experts and base do on data",
        EVALUATE,
        EVALUATE_MORE,
    )
    verb.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=str,
        help="folder of a merge or of any model, or NAME=FOLDER; hf:owner/name, an adapter or "
        "delta:FILE in place of a folder",
    )
    helps = {
        "data": ("SOURCE", "inputs of the task of that name; once for every task"),
        "label": ("FIELD", "field with the labels of that task (default label)"),
        "column": ("FIELD", "field to read for that task, or FIELD,FIELD, as with merge"),
        "expert": ("FOLDER", "expert of that task, beside which models are put"),
    }
    for option, (value, words) in helps.items():
        verb.add_argument(
            f"--{option}", action="append", default=[], metavar=f"NAME={value}", help=words
        )
    verb.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="the base, with the heads of the first merge; what adapters and task vectors change",
    )
    _add_sizes(verb, None)
    _add_talk(verb)


def _add_calibration(verb) -> None:
    """Options of a verb that runs models on the experts' inputs."""
    verb.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="inputs of the task of the expert of that name; once for every expert",
    )
    verb.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help="field to read for that expert, or FIELD,FIELD; by default text, for pictures image",
    )
    _add_sizes(verb)


def _add_heads(verb) -> None:
    """What is done with heads of classifiers."""
    verb.add_argument(
        OPTION,
        choices=WISHES,
        default=AUTO,
        help="own: keep every expert's head of its task as it is, beside the merged backbone; "
        "merged: merge heads like everything else; auto, the default: own where shapes or labels "
        "differ from the base's",
    )


def _add_moments(groups) -> None:
    """Add ``moments`` to the subcommands of an ``argparse`` parser."""
    verb = add_verb(
        groups,
        "moments",
        run_moments,
        "measure what a merge needs of a model's data",
        MOMENTS,
        MOMENTS_MORE,
    )
    verb.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    verb.add_argument(
        "--calibration", required=True, metavar="SOURCE", help="inputs of its task, as of merge"
    )
    verb.add_argument(
        "--column",
        metavar="FIELD",
        help="field to read, or FIELD,FIELD; by default text, for pictures image",
    )
    verb.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="file to make, .safetensors"
    )
    verb.add_argument(
        "--folds",
        type=int,
        default=4,
        metavar="N",
        help="parts of the inputs, each held out in turn to choose a ridge by (default 4)",
    )
    _add_sizes(verb)
    _add_talk(verb)


def _add_delta(groups) -> None:
    """Add ``delta`` to the subcommands of an ``argparse`` parser."""
    verb = add_verb(
        groups, "delta", run_delta, "write how an expert differs from its base", DELTA, DELTA_MORE
    )
    expert = "folder of an expert or an adapter, as of merge"
    verb.add_argument("base", metavar="BASE", type=Path, help=FOLDER_OF_BASE)
    verb.add_argument("expert", metavar="EXPERT", type=Path, help=expert)
    verb.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="file to make, .safetensors"
    )
    verb.add_argument(
        "--dtype",
        default="float32",
        choices=sorted(NAMES.values()),
        help="that the differences are stored in (default float32)",
    )
    _add_talk(verb)


def _add_talk(verb) -> None:
    """How much a verb says."""
    verb.add_argument("--quiet", action="store_true", help="print only what went wrong")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_sizes(verb, samples: int | None = SAMPLES) -> None:
    """How many inputs are taken, cut and put together, by verbs that run models on them."""
    verb.add_argument(
        "--samples",
        type=int,
        default=samples,
        metavar="N",
        help=f"inputs of a source at most, evenly spread over it (default {samples or 'all'})",
    )
    verb.add_argument(
        "--max-length",
        type=int,
        default=128,
        metavar="N",
        help="tokens of a text at most; never more than the model has positions (default 128)",
    )
    verb.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="inputs of a forward (default 8)"
    )


class _Config(argparse.Action):
    """A recipe names base and experts, which the command line then need not."""

    def __init__(self, *words, folders: Sequence[argparse.Action], **options):
        super().__init__(*words, **options)
        self.folders = folders

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        for folder in self.folders:
            folder.required = False


def add_verb(groups, name: str, command, help: str, description: str, more: str):
    """One subcommand, whose function is ``command``; its manual keeps its lines.

    Args:
        help: a line for the list of subcommands.
        description, more: what the manual says before and behind the options.
    """
    verb = groups.add_parser(
        name,
        help=help,
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(command=command)
    return verb


def _verb(
    groups,
    name: str,
    command,
    help: str,
    description: str,
    more: str,
    *,
    before: Mapping[str, str] = MappingProxyType({}),
):
    """One subcommand with what all have in common, and its positional arguments of base and
    experts; ``before`` are folders that come first."""
    verb = add_verb(groups, name, command, help, description, more)
    for folder, words in before.items():
        verb.add_argument(folder, metavar=folder.upper(), type=Path, help=words)
    base = verb.add_argument("base", metavar="BASE", type=Path, help=FOLDER_OF_BASE)
    experts = verb.add_argument(
        "experts",
        metavar="EXPERT",
        nargs="+",
        help="folder of an expert or an adapter, which is called as its folder is, or NAME=FOLDER; "
        "hf:owner/name or delta:FILE in place of a folder",
    )
    _add_talk(verb)
    return verb, (base, experts)
