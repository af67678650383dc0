"""Whatever is passed, a method returns a sound result or a MergeError that names what is wrong."""

import copy
import dataclasses
import inspect
import re
import warnings
from collections.abc import Mapping

import odd
import odd_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError
from qpmerge_lite.experts import is_finite

SOLVERS = {"qp": q.QP, "sketched": q.Sketched}
GRADIENTS = ("fisher", "adamerging")
ON_WEIGHTS = (
    "soup", "task_arithmetic", "ties", "dare", "breadcrumbs", "della", "model_stock", "slerp",
    "greedy_soup", "tsv_merge", "iso_c", "dc_merge", "wudi",
)  # fmt: skip
ON_INPUTS = (
    "qp", "regmean", "regmean_plus_plus", "lot", "featcal", "esm", "sketched", "merge_sequentially",
    "merge_together", "audit", "certify", "layer_moments", "tune", *GRADIENTS,
)  # fmt: skip
TAKES_LONG = ("steps", "batch")  # whose large values are no mistakes, but hours
ORDER = (
    "base",
    "entry",
    "state",
    "experts",
    "input",
    "batch",
    "batches",
    "calibration",
    "head",
    "score",
    "solver",
    "grid",
    "recipes",
    "option",
    "argument",
)  # in which changes are made, those of the parts before those of the whole; fmt: skip
NOT_OPTIONS = ("base", "experts", "calibration", "state", "solver", "options", "progress")


# ---------------------------------------------------------------------------------- strategies


def options_of(method):
    """Names of the options of a method."""
    names = [name for name in inspect.signature(getattr(q, method)).parameters]
    if method in SOLVERS:
        names += [field.name for field in dataclasses.fields(SOLVERS[method])] + ["nothing"]
    return [name for name in names if name not in NOT_OPTIONS]


def named(table):
    return st.sampled_from(sorted(table))


@st.composite
def changes(draw, method):
    """One thing to change about a sound call: what, where, and into what."""
    kinds = ["experts", "state", "entry", "entry", "base", "argument"]
    if options_of(method):
        kinds += ["option"] * 4
    if method in ON_INPUTS:
        kinds += ["calibration", "batches", "batch", "batch", "input", "input"]
    kinds += ["head"] * 2 * (method in GRADIENTS)
    kinds += ["score"] * (method in ("greedy_soup", "tune"))
    kinds += ["solver"] * (method == "merge_sequentially") + ["grid"] * 2 * (method == "tune")
    kinds += ["recipes"] * 3 * (method == "merge_together")
    kind = draw(st.sampled_from(kinds))
    if kind == "option":
        option = draw(st.sampled_from(options_of(method)))
        names = set(odd.VALUES) - ({"million"} if option in TAKES_LONG else set())
        if option in ("score", "method"):
            names -= {"module", "class", "function"}  # their errors are those of a user's function
        return kind, option, draw(named(names))
    if kind == "argument":
        which = draw(st.sampled_from(["base", "experts", "calibration", "state"]))
        return kind, which, draw(named(odd.VALUES))
    tables = {
        "experts": odd.MAPPINGS, "calibration": odd.MAPPINGS, "state": odd.MAPPINGS,
        "batch": odd.MAPPINGS, "entry": odd.TENSORS, "input": odd.TENSORS, "base": odd_models.BASES,
        "batches": odd.LISTS, "head": odd.HEADS, "score": odd.SCORES, "solver": odd.SOLVERS,
        "grid": odd.GRIDS, "recipes": odd.RECIPES,
    }  # fmt: skip
    return kind, draw(st.integers(0, 5)), draw(named(tables[kind]))


@st.composite
def calls(draw, method):
    """(method, toy, changes) of a call that is nearly sound."""
    toy = draw(named(odd_models.TOYS))
    some = draw(st.lists(changes(method), min_size=1, max_size=2, unique_by=lambda c: c[0]))
    return method, toy, sorted(some, key=lambda change: ORDER.index(change[0]))


# --------------------------------------------------------------------------------------- calls


class Call:
    """A call of a method on a toy, sound until :meth:`change`."""

    def __init__(self, method, toy):
        self.method = method
        self.base, self.experts, self.calibration = odd_models.toy(toy)
        self.state = self.experts["a"]
        self.options = {}
        if method in GRADIENTS:
            self.options["heads"] = dict.fromkeys(odd_models.TASKS, nn.Identity())
        if method == "greedy_soup":
            self.options["score"] = len
        if method == "adamerging":
            self.options |= {"steps": 2, "batch": 4}
        if method == "wudi":
            self.options["steps"] = 2
        if method == "qp":
            self.options |= {"folds": 2, "ridges": (0.1, 1.0)}
        if method in ("merge_sequentially", "layer_moments"):
            self.options["folds"] = 1
        if method == "merge_sequentially":
            self.options |= {"solver": q.RegMean(), "progress": False}
        if method == "merge_together":
            self.options["recipes"] = odd.RECIPES["sound"]
        if method == "tune":
            self.options |= {"method": q.soup, "grid": [{}], "score": len}

    def change(self, kind, where, name):
        """Make one thing odd."""
        if kind == "option":
            self.options[where] = odd.value(name)
        elif kind == "argument":
            setattr(self, where, odd.value(name))
        elif kind == "base":
            with warnings.catch_warnings(action="ignore"):
                self.base = odd_models.BASES[name](self.base)
            if where > 2 and isinstance(self.base, nn.Module):
                states = [copy.deepcopy(self.base.state_dict()) for _ in odd_models.TASKS]
                self.experts = dict(zip(odd_models.TASKS, states))
        elif kind in ("head", "score", "solver", "grid", "recipes"):
            self._change_function(kind, where, name)
        elif kind == "experts":
            self.experts = odd.MAPPINGS[name](self.experts)
        elif kind == "calibration":
            self.calibration = odd.MAPPINGS[name](self.calibration)
        elif kind in ("state", "entry"):
            self._change_state(kind, where, name)
        else:
            self._change_batches(kind, where, name)

    def _change_function(self, kind, where, name):
        if kind == "head":
            self.options["heads"] = dict.fromkeys(odd_models.TASKS, odd.HEADS[name])
        elif kind == "score":
            self.options["score"] = odd.SCORES[name]
        elif kind == "grid":
            self.options |= {"grid": odd.GRIDS[name], "method": q.task_arithmetic}
        elif kind == "solver":
            self.options["solver"] = odd.SOLVERS[name]
        else:
            self.options["recipes"] = odd.RECIPES[name]

    def _change_state(self, kind, where, name):
        of_expert = where % 2 and isinstance(self.experts, dict) and "a" in self.experts
        state = self.experts["a"] if of_expert else self.state
        if not isinstance(state, dict) or not state:
            return
        if kind == "state":
            state = odd.MAPPINGS[name](state)
        else:
            key = list(state)[where % len(state)]
            state = {**state, key: _tensor(name, state[key])}
        if of_expert:
            self.experts = {**self.experts, "a": state}
        else:
            self.state = state

    def _change_batches(self, kind, where, name):
        if not isinstance(self.calibration, dict) or "a" not in self.calibration:
            return
        batches = self.calibration["a"]
        if kind == "batches":
            self.calibration["a"] = odd.LISTS[name](batches)
            return
        place = where % len(batches) if isinstance(batches, list) and batches else None
        if place is None or not isinstance(batches[place], dict) or not batches[place]:
            return
        batch = batches[place]
        if kind == "batch":
            changed = odd.MAPPINGS[name](batch)
        else:
            key = list(batch)[where % len(batch)]
            changed = {**batch, key: _tensor(name, batch[key])}
        self.calibration["a"] = [*batches[:place], changed, *batches[place + 1 :]]

    def make(self):
        """The result."""
        method = getattr(q, self.method)
        if self.method in ON_WEIGHTS:
            return method(self.base, self.experts, **self.options)
        if self.method == "audit":
            return method(self.base, self.state, self.experts, self.calibration, **self.options)
        if self.method == "certify":
            layers = self.options.get("layers")
            if layers is None:
                layers = q.layer_moments(self.base, self.experts, self.calibration, folds=1)
            return method(layers, self.base, self.state)
        if self.method == "tune":
            first = {k: self.options[k] for k in ("method", "grid", "score")}
            return method(*first.values(), self.base, self.experts, self.calibration)
        return method(self.base, self.experts, self.calibration, **self.options)

    def names(self):
        """Words one of which an error must contain."""
        words = {*options_of(self.method), *NOT_OPTIONS, "batch", "layer", "the model", "scale"}
        for table in (self.experts, self.calibration, self.state):
            words |= {str(key) for key in table} if isinstance(table, Mapping) else set()
        modules = self.base.named_modules() if isinstance(self.base, nn.Module) else ()
        words |= {name for name, _ in modules if name}
        return words - {"t", "a", "b"} | {"t:", "'a'", "'b'", self.method}


def _tensor(name, value):
    """Another value in place of a tensor; the tensor where PyTorch has no such one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return odd.TENSORS[name](value)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return value


# -------------------------------------------------------------------------------------- checks


def snapshot(base):
    """What must not change about a base."""
    if not isinstance(base, nn.Module):
        return None
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), list(m.__dict__))
        for m in base.modules()
    ]
    owned = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    values = {}
    for name, tensor in owned.items():
        values[name] = id(tensor), tensor.requires_grad, tensor.grad, tensor._version
    return modules, values, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()


def assert_sound(call, result):
    """Merges are of the base's shapes and dtypes and finite; so are figures."""
    merges = result if isinstance(result, (tuple, list)) else [result]
    if isinstance(result, Mapping):
        merges = list(result.values())
    for merge in merges:
        if isinstance(merge, q.Merge):
            assert_fits(merge.state_dict, call.base)
    if call.method in ("audit", "certify"):
        for number in figures(result):
            assert number is None or number == number, "a figure is NaN"


def figures(result):
    """All numbers of a nested result."""
    if isinstance(result, Mapping):
        return [number for value in result.values() for number in figures(value)]
    if isinstance(result, list):
        return [number for value in result for number in figures(value)]
    return [result]


def assert_fits(state, base):
    """A merged state dict has the base's names, shapes and dtypes, and is finite."""
    reference = base.state_dict()
    assert list(state) == list(reference)
    for name, like in reference.items():
        value = state[name]
        assert isinstance(value, Tensor) and not value.requires_grad, name
        assert (value.shape, value.dtype) == (like.shape, like.dtype), name
        assert is_finite(value), name


def check(method, toy, some):
    """The property: see the head of this file."""
    call = Call(method, toy)
    for change in some:
        call.change(*change)
    before = snapshot(call.base)
    try:
        result = call.make()
    except MergeError as error:
        message, words = str(error), call.names()
        assert len(message) > 20, message
        patterns = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in words]
        assert any(re.search(pattern, message) for pattern in patterns), message
    else:
        assert_sound(call, result)
    assert snapshot(call.base) == before, "the base is not as it was"


@pytest.mark.parametrize("method", [*ON_WEIGHTS, *ON_INPUTS])
@pytest.mark.parametrize("toy", sorted(odd_models.TOYS))
def test_sound_calls_have_results(method, toy):
    call = Call(method, toy)
    assert_sound(call, call.make())


def hold(method, count):
    """Check the property on so many calls."""

    @settings(max_examples=count)
    @given(calls(method))
    def holds(example):
        check(*example)

    holds()


@pytest.mark.parametrize("method", [*ON_WEIGHTS, *ON_INPUTS])
def test_odd_calls_have_results_or_errors_that_help(method):
    hold(method, 60)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*ON_WEIGHTS, *ON_INPUTS])
def test_many_odd_calls_have_results_or_errors_that_help(method):
    hold(method, 3000)
