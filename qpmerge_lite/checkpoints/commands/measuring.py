"""The verbs that merge nothing: ``moments``, ``delta``, ``diagnose`` and ``evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

from ..findings import size
from .words import columns, named_folders, pairs, shows_progress, talks


def run_moments(arguments) -> int:
    from ..moments.measuring import Measurement, measure

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
    about = measure(order, progress=shows_progress(arguments))
    if arguments.json:
        print(json.dumps({"out": str(order.out)} | about, indent=1))
    elif talks(arguments):
        count, folds = about["calibration"]["inputs"], about["folds"]
        print(f"measured: {about['layers']} layers on {count} inputs in {folds} folds")
        print(f"written: {order.out}, {size(order.out.stat().st_size)}")
    return 0


def run_delta(arguments) -> int:
    from ..deltas.writing import Difference, write_difference

    order = Difference(arguments.base, arguments.expert, arguments.out, arguments.dtype)
    told = write_difference(order, progress=shows_progress(arguments))
    if arguments.json:
        print(json.dumps({"out": str(order.out)} | told, indent=1))
    elif talks(arguments):
        of = told["differences"] + told["unchanged"]
        print(f"differences: {told['differences']} of {of} tensors")
        count, tensors = sum(told["inexact"].values()), len(told["inexact"])
        exactly = "bit for bit" if not count else f"but for {count:,} numbers in {tensors} tensors"
        print(f"base and differences give the expert back, {exactly}")
        print(f"written: {order.out}, {size(order.out.stat().st_size)}")
    return 0


def run_diagnose(arguments) -> int:
    from ..diagnosis.page import check_report, write_page

    calibration = pairs(arguments.calibration, "--calibration", "french=french.jsonl")
    experts = named_folders(arguments.experts)
    if arguments.report is not None:
        check_report(arguments.report, [arguments.merged, arguments.base, *experts.values()])

    from ..diagnosis.diagnosing import Question, diagnose_folders
    from ..diagnosis.summary import as_text
    from ..output import plain

    question = Question(
        merged=arguments.merged,
        base=arguments.base,
        experts=experts,
        calibration=dict(calibration),
        columns=columns(arguments.column),
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
    )
    diagnosis = diagnose_folders(question, progress=shows_progress(arguments))
    if arguments.report is not None:
        write_page(arguments.report, diagnosis)
    if arguments.json:
        print(json.dumps(plain(diagnosis), indent=1))
    elif talks(arguments):
        print(as_text(diagnosis))
        if arguments.report is not None:
            print(f"written: {arguments.report}")
    return 0


def run_evaluate(arguments) -> int:
    from ..evaluation.evaluating import Evaluation, evaluate_folders
    from ..evaluation.table import as_text
    from ..output import plain

    experts = pairs(arguments.expert, "--expert", "french=tuned/french")
    question = Evaluation(
        models=named_folders(arguments.models, "model"),
        data=dict(pairs(arguments.data, "--data", "french=french-test.jsonl")),
        labels=pairs(arguments.label, "--label", "french=label"),
        columns=columns(arguments.column),
        experts={name: Path(place) for name, place in experts.items()},
        base=arguments.base,
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
    )
    evaluation = evaluate_folders(question, progress=shows_progress(arguments))
    if arguments.json:
        print(json.dumps(plain(evaluation), indent=1))
    elif talks(arguments):
        print(as_text(evaluation))
    return 0
