"""What calibration batches may hold, how large they are, and how models are made to run on them."""

import re
import warnings
from collections import OrderedDict, UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qpmerge_lite.calibration import check_calibration
from qpmerge_lite.errors import EmptyCalibration, MergeError
from qpmerge_lite.forwards import evaluating, main_output, refuse_what_cannot_run

X = torch.randn(8, 6)
IDS = torch.ones(4, 7, dtype=torch.long)


def checked(*batches, task="a"):
    return check_calibration({task: list(batches)}, [task], "cpu")[task]


def test_batches_are_numbered_and_counted():
    first, second = checked({"inputs": X}, {"inputs": X[:3]})
    assert (first.task, first.number, first.size, first.start) == ("a", 0, 8, 0)
    assert (second.task, second.number, second.size, second.start) == ("a", 1, 3, 8)
    assert first.arguments["inputs"] is X


def test_generators_and_other_iterables_are_read_once():
    two = [{"inputs": X}] * 2
    for batches in ((batch for batch in two), iter(two), tuple(two)):
        found = check_calibration({"a": batches}, ["a"], "cpu")["a"]
        assert [batch.number for batch in found] == [0, 1]
    (batch,) = checked(UserDict(inputs=X))
    assert batch.arguments == {"inputs": X}


def test_only_the_wanted_tasks_are_read():
    assert list(check_calibration({"a": [{"x": X}], "b": "nonsense"}, ["a"], "cpu")) == ["a"]


def test_plain_values_pass_through():
    plain = {"mask": None, "causal": True, "depth": 3, "scale": 0.5, "mode": "fast"}
    (batch,) = checked({"inputs": X, **plain})
    assert {key: batch.arguments[key] for key in plain} == plain and batch.size == 8


@pytest.mark.parametrize(
    "arguments, size",
    [
        ({"inputs": X}, 8),
        ({"step": torch.tensor(3), "inputs": X}, 8),
        ({"step": torch.tensor([3]), "inputs": X}, 8),
        ({"position_ids": torch.arange(7)[None], "input_ids": IDS}, 4),
        ({"position_ids": torch.arange(7)[None], "tokens": IDS}, 4),
        ({"pixel_values": X, "input_ids": IDS, "attention_mask": IDS}, 4),
        ({"other": torch.ones(3, 2), "pixel_values": X}, 8),
        ({"labels": torch.ones(5), "inputs_embeds": torch.ones(2, 3, 4)}, 2),
        ({"one": torch.ones(2, 5), "two": torch.ones(3), "three": torch.ones(3, 1)}, 3),
        ({"inputs": torch.ones(1, 6)}, 1),
        ({"step": torch.tensor(3)}, 1),
        ({"input_ids": IDS[:1], "table": torch.ones(9, 2)}, 1),
    ],
)
def test_the_size_of_a_batch_is_its_number_of_sequences(arguments, size):
    (batch,) = checked(arguments)
    assert batch.size == size


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"inputs": [[1.0]]}, "key 'inputs': expected a tensor, .* found list"),
        ({"inputs": np.ones((2, 2))}, "key 'inputs': expected a tensor, .* found ndarray"),
        ({"inputs": {"x": X}}, "key 'inputs': expected a tensor, .* found dict"),
        ({"inputs": (X, X)}, "key 'inputs': expected a tensor, .* found tuple"),
        ({"inputs": X, "more": b""}, "key 'more': expected a tensor, .* found bytes"),
        ({0: X}, "key 0: expected the name of an argument, found int"),
        ((X, X), "expected a mapping .* found tuple"),
        ([X], "expected a mapping .* found list"),
        (X, "expected a mapping .* found Tensor"),
        ("text", "expected a mapping .* found str"),
        (None, "expected a mapping .* found NoneType"),
        ({"mask": None, "causal": True}, r"expected a mapping .* \['causal', 'mask'\]"),
        ({"x": X.to("meta")}, "key 'x': .* meta device"),
        ({"x": X, "attention_mask": torch.ones(8)}, r"'attention_mask': .* \(B, S\), .* \(8,\)"),
        (
            {"x": IDS, "decoder_attention_mask": torch.ones(4, 1, 7, 7)},
            r"'decoder_attention_mask': .* \(B, S\), .* found \(4, 1, 7, 7\)",
        ),
    ],
)
def test_what_is_no_batch_is_one_error_with_its_place(batch, message):
    with pytest.raises(MergeError, match=f"task 'a', batch 1.*{message}"):
        checked({"inputs": X}, batch)


@pytest.mark.parametrize(
    "calibration, message",
    [
        ([{"inputs": X}], "calibration: expected a mapping of task names .* found list"),
        (None, "calibration: expected a mapping of task names .* found NoneType"),
        ({"a": {"inputs": X}}, r"task 'a': expected a list .* found a single one .*\[batch\]"),
        ({"a": X}, "task 'a': expected a list of batches, found Tensor"),
        ({"a": "text"}, "task 'a': expected a list of batches, found str"),
        ({"a": 3}, "task 'a': expected a list of batches, found int"),
    ],
)
def test_what_is_no_calibration_is_named(calibration, message):
    with pytest.raises(MergeError, match=message):
        check_calibration(calibration, ["a"], "cpu")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.tensor(3)}], "key 'input_ids': expected a row per input, found a"),
        (
            [{"input_ids": IDS, "attention_mask": torch.tensor(1)}],
            r"key 'attention_mask': expected shape \(B, S\).*found \(\)",
        ),
        (
            [{"inputs": X, "scale": torch.ones(8)}, {"inputs": X, "scale": torch.tensor(1.0)}],
            "batch 1, key 'scale': expected a tensor with rows, as in other batches, found a",
        ),
    ],
)
def test_single_numbers_in_place_of_rows_are_named(batches, message):
    with pytest.raises(MergeError, match=message):
        checked(*batches)


def test_a_number_for_all_inputs_is_no_question():
    (batch,) = checked({"inputs": X, "scale": torch.tensor(2.0)})
    assert batch.size == 8 and batch.one_per_input == ["inputs"]


@pytest.mark.parametrize("batches", [[], None, iter(()), [{"inputs": X}, {}]])
def test_tasks_without_inputs_are_named(batches):
    message = re.escape("no calibration batches for ['b']; give every expert at least one batch")
    with pytest.raises(EmptyCalibration, match=message):
        check_calibration({"a": [{"inputs": X}], "b": batches}, "ab", "cpu")
    with pytest.raises(EmptyCalibration, match=message):
        check_calibration({"a": [{"inputs": X}]}, "ab", "cpu")


@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
def test_empty_tensors_are_named(shape):
    with pytest.raises(EmptyCalibration, match="task 'a', batch 1, key 'inputs': .* empty tensor"):
        checked({"inputs": X}, {"inputs": torch.empty(shape)})


# ----------------------------------------------------------------------------- the model


def configured():
    """Parts that share a configuration, one that caches by another word for yes, and one not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout(), nn.Linear(2, 2))
    shared = SimpleNamespace(use_cache=True)
    model.config = model[0].config = shared
    model[1].config = SimpleNamespace(use_cache=False)
    model[2].config = SimpleNamespace(use_cache=1)
    model[2].eval()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_leaves_the_model_as_it_was(fails):
    model = configured()
    modes = [module.training for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not any(model[i].config.use_cache for i in (0, 1, 2))
            assert not torch.backends.mha.get_fastpath_enabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert [model[i].config.use_cache for i in (0, 1, 2)] == [True, False, 1]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_hooks_see_every_layer_of_an_encoder_and_no_nested_tensor():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, seen = nn.TransformerEncoder(layer, 2).train(), []
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    padding = torch.arange(7) >= torch.tensor([[3], [7]])
    with evaluating(model), torch.no_grad():
        model(torch.randn(2, 7, 8), src_key_padding_mask=padding)
    assert seen == [False] * 4


def test_the_main_output_is_the_first_tensor_with_an_axis():
    loss = torch.tensor(0.5)
    for output in (X, (X, loss), [X], (loss, X), [None, X, IDS], {"loss": loss, "logits": X}):
        assert main_output(output) is X
    assert main_output(OrderedDict(cache=None, hidden=X)) is X


@pytest.mark.parametrize("output", ["text", None, (), {}, [None], torch.tensor(1.0)])
def test_outputs_without_such_a_tensor_are_named_by_type(output):
    with pytest.raises(MergeError, match=f"returns {type(output).__name__}: expected a tensor"):
        main_output(output)


class QuantLinear(nn.Module):
    def __init__(self):
        super().__init__()
        codes = torch.zeros(2, 2, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)


def compiled_in_place():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile(backend="eager")
    return model


def compiled():
    return torch.compile(nn.Linear(2, 2), backend="eager")


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Identity(), torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "build, message",
    [
        (compiled, r"the model \(OptimizedModule\) is compiled"),
        (lambda: nn.Sequential(compiled()), "module '0' .* is compiled"),
        (compiled_in_place, r"module '0' \(Linear\) is compiled"),
        (scripted, "module '1' .* is a ScriptModule"),
        (lambda: nn.Linear(2, 2, device="meta"), "the model .* has its 'weight' on the meta"),
        (lambda: nn.BatchNorm1d(2, affine=False, device="meta"), "'running_mean' on the meta"),
        (lambda: nn.Sequential(QuantLinear()), "module '0' .* holds quantised weights"),
        (lambda: {"weight": X}, "base: expected a model .*, found dict"),
    ],
)
def test_models_that_cannot_be_watched_are_refused_by_name(build, message):
    with pytest.raises(MergeError, match=message):
        refuse_what_cannot_run(build())


def test_models_that_can_be_watched_are_not_refused():
    counting = nn.BatchNorm1d(3)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    table, waves = nn.Embedding(4, 2, dtype=torch.bfloat16), nn.Linear(2, 2, dtype=torch.cfloat)
    refuse_what_cannot_run(nn.Sequential(counting, frozen, table, waves))
