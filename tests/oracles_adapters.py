"""Adapters folded by ``qpmerge merge`` against peft's ``merge_and_unload``, called, never copied.
``make oracles`` runs this file.

Every case is a small model of transformers with an adapter of peft, all of whose parameters are
random. What is compared is the merge of that adapter alone with the model that peft makes of it and
transformers save: in steps of the stored dtype, where 0 says that all bits are the same.
"""

import io
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

from qpmerge_lite.checkpoints.merging import merge_folders
from qpmerge_lite.checkpoints.orders import Order

STEPS = 4  # of float32, where norms and convolutions add up in another order
SIZE = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZE, "intermediate_size": 12, "num_key_value_heads": 1}


def llama(tied=False, **fields):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied, **fields)
    return transformers.LlamaForCausalLM(config)


def tied_llama():
    return llama(tied=True)


def llama_with_biases():
    return llama(attention_bias=True, mlp_bias=True)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**SIZE, intermediate_size=12, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    return transformers.ResNetForImageClassification(config)


@dataclass
class Case:
    """An adapter: the model that it is of, what peft is told, and the steps that are allowed."""

    name: str
    make: object
    options: dict  # of LoraConfig
    dtype: torch.dtype = torch.float32
    steps: int = 0
    base: object = None  # what the folder of the base has of the model; all of it by default


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = [
    Case("plain", llama, {"target_modules": ATTENTION}),
    Case("half precision", llama, {"target_modules": ATTENTION}, torch.bfloat16),
    Case("float16", llama, {"target_modules": ATTENTION}, torch.float16),
    Case("double precision", llama, {"target_modules": ATTENTION}, torch.float64),
    Case("rank-stabilised", llama, {"target_modules": "all-linear", "use_rslora": True}),
    Case(
        "patterns",
        llama,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 1},
            "alpha_pattern": {r"layers\.1\..*": 5, "k_proj": 9},
        },
    ),
    Case("some layers", llama, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    Case("DoRA", llama, {"target_modules": ATTENTION, "use_dora": True}, steps=STEPS),
    Case(
        "DoRA, half precision", llama, {"target_modules": ATTENTION, "use_dora": True},
        torch.bfloat16, 1,
    ),
    Case("all biases", llama_with_biases, {"target_modules": ["q_proj"], "bias": "all"}),
    Case(
        "biases of layers", llama_with_biases, {"target_modules": ["q_proj"], "bias": "lora_only"}
    ),
    Case("LoRA's biases", llama_with_biases, {"target_modules": ["q_proj"], "lora_bias": True}),
    Case(
        "both biases", llama_with_biases,
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
    ),
    Case("embedding", llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    Case("tied embedding", tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    Case(
        "DoRA of an embedding", llama, {"target_modules": ["embed_tokens"], "use_dora": True},
        steps=STEPS,
    ),
    Case(
        "whole modules", llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        torch.bfloat16,
    ),
    Case(
        "rows of an embedding", llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 0, 3]}},
    ),
    Case(
        "rows of a tied embedding", tied_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 0]},
    ),
    Case("Gaussian start", llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    Case("Conv1D", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    Case("Conv1D, square", gpt2, {"target_modules": r".*attn\.c_proj"}),
    Case(
        "Conv1D, DoRA", gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
        steps=STEPS,
    ),
    Case("Conv1D without the head", gpt2, {"target_modules": ["c_attn"]}, base="transformer"),
    Case(
        "classifier", bert,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, torch.bfloat16,
    ),
    Case(
        "classifier, all biases", bert,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    Case("convolutions", resnet, {"target_modules": ["convolution"]}, steps=STEPS),
    Case(
        "convolutions, DoRA", resnet, {"target_modules": ["convolution"], "use_dora": True},
        steps=STEPS,
    ),
    Case(
        "convolutions and norms", resnet,
        {"target_modules": ["convolution"], "modules_to_save": ["normalization"]}, steps=STEPS,
    ),
]  # fmt: skip


def prepared(case: Case, root: Path) -> None:
    """Folders ``base``, ``adapter``, and ``expected``: what peft makes of them."""
    torch.manual_seed(0)
    model = case.make().to(case.dtype)
    model.save_pretrained(root / "whole")
    kept = getattr(model, case.base) if case.base else model
    kept.save_pretrained(root / "base")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | case.options)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape)
                parameter.add_(noise.to(parameter.dtype))
    tuned.save_pretrained(root / "adapter")
    base = type(case.make()).from_pretrained(root / "whole", dtype=case.dtype)
    merged = peft.PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
    kept = getattr(merged, case.base) if case.base else merged
    kept.save_pretrained(root / "expected")


def steps_apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest distance of entries, in steps of their dtype at the largest entry of the tensor."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    largest = wanted.double().abs().max()
    apart = (found.double() - wanted.double()).abs().max()
    return float(apart / largest / torch.finfo(wanted.dtype).eps) if apart else 0.0


def difference(case: Case, method: str, root: Path) -> tuple[float, int, int]:
    """Steps between the two, how many entries differ, and how many the adapter changes."""
    options = {"scale": 1.0} if method == "task_arithmetic" else {}
    out = root / method
    order = Order(root / "base", {"one": root / "adapter"}, out, method=method, options=options)
    merge_folders(order)
    found, wanted = (
        load_file(out / "model.safetensors"),
        load_file(root / "expected/model.safetensors"),
    )
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    assert all(found[name].dtype == value.dtype for name, value in wanted.items())
    differing = sum(int((found[name] != value).sum()) for name, value in wanted.items())
    steps = max(steps_apart(found[name], value) for name, value in wanted.items())
    before = load_file(root / "base/model.safetensors")
    return steps, differing, sum(int((before[name] != wanted[name]).sum()) for name in wanted)


def main() -> bool:
    """Print a line per case and method; whether any of them differs by more than is allowed."""
    print(
        f"peft {version('peft')}, transformers {version('transformers')}, torch {torch.__version__}"
    )
    transformers.utils.logging.set_verbosity_error()
    differs = False
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                with redirect_stderr(io.StringIO()):
                    prepared(case, root)
            for method in ("soup", "task_arithmetic"):
                steps, differing, count = difference(case, method, root)
                allowed = case.steps + (method == "task_arithmetic")
                verdict = "" if steps <= allowed else "DIFFERS"
                differs |= bool(verdict)
                told = f"{steps:7.2g} steps, {differing:5} of {count} changed"
                print(f"{case.name:28} {method:16} {told}  {verdict}".rstrip(), flush=True)
    return differs


if __name__ == "__main__":
    sys.exit(main())
