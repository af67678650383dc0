"""The commands ``qpmerge merge``, ``check``, ``moments`` and ``diagnose``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..errors import MergeError
from .calibration.sources import SAMPLES
from .compatibility import Report
from .findings import WARNING, Finding, Refused
from .hub import check_places, reference_of
from .methods import CALIBRATED, WEIGHTS_ONLY, assignment, literal
from .recipes.settings import RULES

MERGE = """
Merge fine-tuned models into one, without training.

BASE is the folder of the model that all EXPERTs were tuned from, in the format of Hugging Face:
config.json with model.safetensors, or with shards and their index. An EXPERT is such a folder, or
one with an adapter of peft for BASE: adapter_config.json with adapter_model.safetensors. Each may
be at the Hub instead, as hf:owner/name or hf:owner/name@revision. The merge is written to a
folder of the same kind, with the base's shards, names, dtypes, tokenizer and configuration, so
that from_pretrained loads it. merge.json in it says how it was made.
"""
MERGE_MORE = f"""
methods:
  that look at weights only:
    {", ".join(WEIGHTS_ONLY[:7])},
    {", ".join(WEIGHTS_ONLY[7:])}
  that run the models on calibration inputs (these need transformers):
    {", ".join(CALIBRATED)}
  Options of a method are those of the Python function of that name: help(qpmerge_lite.ties).

calibration:
  Unlabelled inputs of an expert's task, some dozens to some hundreds. SOURCE is one of
    JSON lines (.jsonl), a field "text"; Parquet, a column "text"; plain text, an input a line;
    a folder of pictures, or of folders of them, for models that read pictures; Parquet with a
    column "image" does too;
    a file of a data set at the Hugging Face Hub, hf://datasets/OWNER/NAME@COMMIT/PATH, which is
    the only thing that a network is asked for.
  --column names another field, or two: a pair of texts, as premise,hypothesis. Models with an
  encoder and a decoder read a text and its target: "text" and "target", or --column NAME=A,B.
  Rows with "messages" in place of "text" are chats, written out by the tokenizer's chat template.
  Labels are not read. Of a source with more than N inputs (--samples), N are taken, evenly apart.
  The expert's own tokenizer or processor reads them, or the base's where its folder has none.

adapters:
  LoRA and DoRA are folded into the base tensor by tensor, as peft's merge_and_unload does it, with
  whole layers, biases, embeddings and rows of these that are trained beside them. What is not
  folded is refused by name.

hub:
  Configuration, tokenizer and safetensors are downloaded to where huggingface_hub keeps its files;
  HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are heeded. merge.json has the commit.

moments:
  With qp and regmean on the experts' own inputs, sums over what each expert's layers read stand in
  for its texts: qpmerge moments writes them, once, and no data are needed here, nor transformers.
  They are of one expert alone, and fit any base, other experts, basis and ridge.

recipes:
  RECIPE is a YAML file of mergekit. Base, models, method and parameters are taken from it, and the
  weights are those of mergekit 0.1.5, of random methods those of its --random-seed N. Methods:
  {", ".join(list(RULES)[:6])},
  {", ".join(list(RULES)[6:])}.
  What is not honoured is refused by its field: adapters, names at the Hub, models made of parts
  of models, other tokenizers than the base's. Reading it needs PyYAML: '.[yaml]'.

files:
  Weights are read from safetensors alone: nothing is unpickled, no code of a checkpoint is run,
  and no network is asked but for hf: names and hf:// sources. Chat templates run in the sandbox
  of transformers. Nothing is written but DIR, and what is downloaded; while DIR is made it is a
  hidden folder beside it, .DIR.NUMBER.partial, which a killed process leaves there and which can
  be deleted. The same command on the same machine writes the same bytes.

exit status:
  0  the merge is there
  1  it was refused, with the reason on the error stream; there is no DIR then
  2  the command was not understood

examples:
  qpmerge merge base french=tuned/fr german=tuned/de --out merged
  qpmerge merge base tuned/fr tuned/de --out merged --method ties --option density=0.1
  qpmerge merge base fr=tuned/fr de=tuned/de --out merged \\
      --calibration fr=fr.jsonl --calibration de=de.txt
  qpmerge moments tuned/fr --calibration fr.jsonl --out fr.moments.safetensors
  qpmerge merge base fr=tuned/fr de=tuned/de --out merged \\
      --moments fr=fr.moments.safetensors --moments de=de.moments.safetensors
  qpmerge merge --config recipe.yml --out merged
"""
MOMENTS = """
Measure what a model's layers read of its own data, so that others can merge it without them.

The model is run once, alone, over its calibration texts. For every layer the file has the sums of
products of what it reads, by fold of the texts, and says which model, tokenizer and texts they are
of, by SHA-256.
"""
MOMENTS_MORE = """
what a file reveals:
  It is not anonymous. It has how often each token occurs, wherever the table of tokens is solved,
  and otherwise the layers behind it have what such counts can be worked out from; with few texts,
  whole inputs may be. Publish it as you would publish the texts, or word counts of them.

size:
  In float32, two bytes times the square of the width of what a layer reads, for each fold and each
  group of layers that read the same. --folds 1 is smallest, and leaves no ridge to be chosen.

exit status:
  0  the file is there
  1  it was refused, with the reason on the error stream; there is no file then
  2  the command was not understood

example:
  qpmerge moments tuned/fr --calibration fr.jsonl --out fr.moments.safetensors
"""
CHECK = """
Say whether checkpoints can be merged, before any weight is read.

Configurations and headers of safetensors files are compared: architecture, names, shapes and
dtypes of tensors, vocabulary, tokenizer, tied, quantised and pickled weights, missing and damaged
files. Every finding has a place, what was expected, what was found, and what to do. Of checkpoints
at the Hub, small files and headers are fetched; what a merge would download is said.
"""
CHECK_MORE = """
levels:
  ERROR    no merge is made of these
  WARNING  one is made, but see whether it is what you mean
  INFO     good to know

exit status:
  0  there is no ERROR
  1  there is one
  2  the command was not understood

example:
  qpmerge check base french=tuned/fr german=tuned/de
"""
DIAGNOSE = """
Say what a merge, whoever made it, does to every expert's outputs and to every layer.

MERGED is the folder of the merge, BASE that of the model that all EXPERTs were tuned from. All
three kinds of model read the texts of every expert's task. Where the model has a head or predicts
tokens, predictions are compared, and perplexities where it predicts the next token; otherwise what
the model puts out. Nothing needs labels.
"""
DIAGNOSE_MORE = """
numbers:
  Every number comes with its meaning. Texts that the merge was made on flatter it: give others.
  A certificate says of a layer how far the merge is from the best that these texts allow.

files:
  Nothing is written but the report: one page of HTML that loads nothing and runs nothing; one
  that is there is replaced. Otherwise as with qpmerge merge.

exit status:
  0  the diagnosis is there, whatever it says
  1  it was refused, with the reason on the error stream; no report is written then
  2  the command was not understood

example:
  qpmerge diagnose merged base fr=tuned/fr de=tuned/de \\
      --calibration fr=fr.jsonl --calibration de=de.txt --report merged.html
"""


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse a command line, by default that of the process, and run the ``command`` that it sets.
    Returns the exit status: 0 done, 1 refused or failed; ``argparse`` leaves with 2 at wrong
    usage."""
    parsed = parser.parse_args(arguments)
    try:
        return parsed.command(parsed)
    except MergeError as error:
        print(f"qpmerge: {error}", file=sys.stderr)
        return 1


def add_verbs(groups) -> None:
    """Add the verbs to the subcommands of an ``argparse`` parser; what is parsed has their function
    as ``command``."""
    merge, folders = _verb(groups, "merge", _merge, "merge checkpoints into one", MERGE, MERGE_MORE)
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
    _add_moments(groups)
    _verb(groups, "check", _check, "say whether checkpoints can be merged", CHECK, CHECK_MORE)
    diagnose, _ = _verb(
        groups,
        "diagnose",
        _diagnose,
        "say what a merge does to every expert",
        DIAGNOSE,
        DIAGNOSE_MORE,
        before={"merged": "folder of the merge"},
    )
    _add_calibration(diagnose)
    diagnose.add_argument(
        "--report", type=Path, metavar="FILE.html", help="also write a page with charts"
    )


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


def _add_moments(groups) -> None:
    """Add ``moments`` to the subcommands of an ``argparse`` parser."""
    verb = groups.add_parser(
        "moments",
        help="measure what a merge needs of a model's data",
        description=MOMENTS,
        epilog=MOMENTS_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    verb.set_defaults(command=_moments)


def _add_talk(verb) -> None:
    """How much a verb says."""
    verb.add_argument("--quiet", action="store_true", help="print only what went wrong")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_sizes(verb) -> None:
    """How many inputs are taken, cut and put together, by verbs that run models on them."""
    verb.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help=f"inputs of a source at most, evenly spread over it (default {SAMPLES})",
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
    verb = groups.add_parser(
        name,
        help=help,
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for folder, words in before.items():
        verb.add_argument(folder, metavar=folder.upper(), type=Path, help=words)
    base = verb.add_argument(
        "base", metavar="BASE", type=Path, help="folder of the base, or hf:owner/name"
    )
    experts = verb.add_argument(
        "experts",
        metavar="EXPERT",
        nargs="+",
        help="folder of an expert or an adapter, which is called as its folder is, or NAME=FOLDER; "
        "hf:owner/name in place of a folder",
    )
    _add_talk(verb)
    verb.set_defaults(command=command)
    return verb, (base, experts)


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Experts of the command line: name -> folder, in their order.

    Args:
        words: folders or references, which give their own name, or ``NAME=FOLDER``.
    Raises: Refused for a name that is there twice.
    """
    experts: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not (equals and name and place) or "/" in name or Path(word).exists():
            name, place = _own_name(word), word
        if name in experts:
            expected = "experts with names of their own"
            cure = "give names, such as first=FOLDER second=FOLDER"
            raise Refused(f"expert {name!r}", expected, "two of that name", cure)
        experts[name] = Path(place)
    return experts


def _own_name(word: str) -> str:
    """What an expert is called that was not given a name."""
    reference = reference_of(word)
    return reference.name if reference else Path(word).resolve().name


def _pairs(words: Sequence[str], option: str, example: str) -> dict[str, str]:
    """``NAME=VALUE`` of an option that may be there several times."""
    pairs: dict[str, str] = {}
    for word in words:
        name, value = assignment(word, option, example)
        if name in pairs:
            raise Refused(option, f"{name!r} once", "it twice", "leave one of them out")
        pairs[name] = value
    return pairs


def _check(arguments) -> int:
    report, missing = check_places(arguments.base, named_folders(arguments.experts))
    if arguments.json:
        print(json.dumps(report.as_json() | {"downloads": missing}, indent=1))
    else:
        _print_findings(report, arguments.quiet, missing)
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


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def _merge(arguments) -> int:
    from .merging import merge_folders

    order = _order(arguments)
    talks = not (arguments.quiet or arguments.json)
    manifest = merge_folders(order, progress=talks and sys.stderr.isatty())
    if arguments.json:
        from .output import plain

        print(json.dumps({"out": str(order.out)} | plain(manifest), indent=1))
    elif talks:
        _tell(order.out, manifest)
    return 0


def _moments(arguments) -> int:
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


def _tell(out: Path, manifest: dict) -> None:
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
    print(f"written: {out}")


def _diagnose(arguments) -> int:
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
