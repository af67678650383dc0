"""Tiny models on disk, recipes for them, and what mergekit makes of each: ``qpmerge merge
--config`` is held to it without mergekit.

``oracles.py`` runs mergekit. Rewrite the file on purpose only, by
``python tests/oracles.py --freeze``.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FROZEN = Path(__file__).with_suffix(".safetensors")
NAMES = ("base", "first", "second", "third")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
# kind of model -> dtype, whether it is in shards, whether its embeddings are tied
KINDS = {
    "bf16": (torch.bfloat16, False, True),
    "fp16": (torch.float16, False, False),
    "fp32": (torch.float32, True, False),
}


def shapes(tied):
    """Tensor -> shape of a Llama of ``CONFIG``."""
    width, inner, tokens = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    half = width // 2
    block = {
        "input_layernorm": (width,),
        "mlp.down_proj": (width, inner),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "post_attention_layernorm": (width,),
        "self_attn.k_proj": (half, width),
        "self_attn.o_proj": (width, width),
        "self_attn.q_proj": (width, width),
        "self_attn.v_proj": (half, width),
    }
    named = {"model.embed_tokens.weight": (tokens, width), "model.norm.weight": (width,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        named |= {f"model.layers.{layer}.{k}.weight": size for k, size in block.items()}
    return named if tied else named | {"lm_head.weight": (tokens, width)}


def states(kind, alike=False):
    """Name of a model -> its tensors.

    Entries of an update have magnitudes of their own, which every dtype holds exactly: which of
    equal ones a sort puts first, torch decides by the machine. With ``alike`` many are equal.
    """
    dtype, _, tied = KINDS[kind]
    generator = torch.Generator().manual_seed(7)
    made = {name: {} for name in NAMES}
    for key, shape in shapes(tied).items():
        count = torch.Size(shape).numel()
        base = torch.randint(-64, 65, shape, generator=generator)
        made["base"][key] = (base / 64).to(dtype)
        for name in NAMES[1:]:
            sizes = torch.randperm(count, generator=generator).reshape(shape)
            if alike:
                sizes = sizes % 5
            signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            made[name][key] = ((base + sizes * signs) / 64).to(dtype)
    return made


def write_models(root, kind, models):
    """Folders of models under ``root``, in one file or in two shards."""
    dtype, sharded, tied = KINDS[kind]
    config = CONFIG | {"tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch.")}
    for name, state in models.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        if not sharded:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            continue
        places, keys = {}, sorted(state)
        for number, part in enumerate((keys[::2], keys[1::2]), 1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({k: state[k] for k in part}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        size = sum(value.nbytes for value in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def flat(folder):
    """All tensors of a folder one after the other in the order of their names (d,), and the
    names."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return torch.cat([state[name].flatten() for name in sorted(state)]), sorted(state)


def recipe(method, models, base="base", more="", **parameters):
    """A recipe of mergekit: ``models`` is model -> its parameters, in flow style."""
    lines = [f"merge_method: {method}"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["models:"]
    for name, own in models.items():
        lines += [f"  - model: {name}"] + ([f"    parameters: {own}"] if own else [])
    if parameters:
        lines += ["parameters:"] + [f"  {k}: {v}" for k, v in parameters.items()]
    return "\n".join([*lines, more, ""])


ALL = {"first": "{weight: 0.7}", "second": "{weight: 0.4}", "third": "{weight: -0.3}"}
THINNED = {
    "first": "{weight: 1.0, density: 0.5}",
    "second": "{weight: 0.6, density: 0.3}",
    "third": "{weight: -0.5, density: 0.8}",
}
SLICES = """
merge_method: slerp
base_model: base
slices:
  - sources:
      - model: first
        layer_range: [0, 3]
      - model: base
        layer_range: [0, 3]
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
"""
EVERY = dict.fromkeys(("first", "second", "third"), "")
WITH_BASE = {"base": "", **ALL}
IN_SINGLE = "dtype: float32\nout_dtype: bfloat16"
RECIPES = {
    "linear": recipe("linear", ALL, base=None),
    "linear with the base": recipe("linear", {"base": "{weight: 0.5}", **ALL}),
    "linear, weight for all": recipe("linear", EVERY, weight=0.3, normalize="false"),
    "linear in float32": recipe("linear", ALL, base=None, more=IN_SINGLE),
    "linear of one": recipe("linear", {"first": "{weight: 2}"}, base=None, more="dtype: float16"),
    "task arithmetic": recipe("task_arithmetic", ALL, **{"lambda": 0.7}),
    "task arithmetic, base listed": recipe("task_arithmetic", WITH_BASE, int8_mask="true"),
    "task arithmetic, normalised": recipe("task_arithmetic", ALL, normalize="true"),
    "task arithmetic, cancelling weights": recipe(
        "task_arithmetic", {"first": "{weight: 1}", "second": "{weight: -1}"}, normalize="true"
    ),
    "ties": recipe("ties", THINNED),
    "ties, defaults": recipe("ties", ALL, density="2e-1", int8_mask="true"),
    "ties, rescaled": recipe("ties", THINNED, normalize="false", rescale="true", **{"lambda": 1.3}),
    "ties in float32": recipe("ties", THINNED, more=IN_SINGLE),
    "ties in float64": recipe("ties", THINNED, more="dtype: float64"),
    "ties of nothing": recipe("ties", ALL, density="[0, 0.01, 1]"),
    "ties on gradients": recipe(
        "ties",
        {
            "first": "{weight: [0.2, 0.9], density: [1, 0.5, 0.1]}",
            "second": "{weight: [{filter: mlp, value: [0, 0.4, 0.8]}, "
            "{filter: embed, value: 0.3}]}",
        },
        weight=0.5,
        density=0.6,
        normalize="[true, false]",
        **{"lambda": "[{filter: '*', value: 0.9}]"},
    ),
    "dare_linear": recipe("dare_linear", THINNED),
    "dare_linear, not rescaled": recipe("dare_linear", THINNED, rescale="false", normalize="true"),
    "dare_ties": recipe("dare_ties", THINNED, **{"lambda": 0.8}),
    "dare_ties in float32": recipe("dare_ties", WITH_BASE, density=0.4, more=IN_SINGLE),
    "dare_ties of nothing": recipe("dare_ties", ALL, density="[0, 1]"),
    "breadcrumbs": recipe("breadcrumbs", THINNED),
    "breadcrumbs, many outliers": recipe("breadcrumbs", ALL, density=0.5, gamma=0.2),
    "breadcrumbs, too many": recipe("breadcrumbs", ALL, density=0.9, gamma=0.3, rescale="true"),
    "breadcrumbs_ties": recipe("breadcrumbs_ties", THINNED, gamma=0.1, normalize="true"),
    "della": recipe("della", ALL, density=0.5),
    "della, own epsilon": recipe(
        "della",
        {
            "first": "{weight: 1.0, density: 0.5, epsilon: 0.3}",
            "second": "{weight: 0.6, density: 1.0}",
            "third": "{weight: 0.5, density: 0.7, epsilon: 0}",
        },
        normalize="false",
        **{"lambda": 1.1},
    ),
    "della_linear": recipe("della_linear", ALL, density=0.6, epsilon=0.2),
    "della_linear, not rescaled": recipe("della_linear", ALL, density=0.6, rescale="false"),
    "slerp": recipe("slerp", {"first": ""}, t=0.3),
    "slerp, base listed": recipe("slerp", {"base": "", "second": ""}, t="[0.1, 0.9]"),
    "slerp of slices": SLICES,
    "model_stock": recipe("model_stock", EVERY),
    "model_stock of two": recipe("model_stock", {"third": "", "first": "", "base": ""}),
    "model_stock, by filters": recipe("model_stock", EVERY, filter_wise="true"),
}
FROZEN_KINDS = ("bf16", "fp32")  # of which answers are kept
# units of the last place of the largest weight; where no number is given, every bit is the same
STEPS = {"slerp": 2}
# mergekit divides by zero there, as 1e-8 is none of float16
NOT_A_NUMBER = {("fp16", "task arithmetic, cancelling weights")}


def apart(title, ours, theirs):
    """How far an answer (d,) is from mergekit's beyond what is allowed; 0 where it is alike."""
    method = RECIPES[title].split("merge_method: ")[1].split()[0]
    if ours.dtype != theirs.dtype:
        return float("inf")
    step = STEPS.get(method, 0) * torch.finfo(theirs.dtype).eps * theirs.double().abs().max()
    return float(((ours.double() - theirs.double()).abs() - step).clamp(min=0).max())


def freeze(answers):
    """Models of all kinds, and mergekit's answers: (kind, title) -> (d,)."""
    tensors, header = {}, {}
    for kind in FROZEN_KINDS:
        for name, state in states(kind).items():
            tensors |= {f"{kind}/{name}/{key}": value for key, value in state.items()}
    for (kind, title), values in answers.items():
        tensors[f"{kind}: {title}"] = values
        header[f"{kind}: {title}"] = RECIPES[title]
    save_file(tensors, FROZEN, metadata={"recipes": json.dumps(header)})


def thaw():
    """Kind -> models, and (kind, title) -> the recipe that mergekit ran and its answer (d,)."""
    models, answers = {}, {}
    with safe_open(FROZEN, "pt") as held:
        recipes = json.loads(held.metadata()["recipes"])
        for key in held.keys():
            if key in recipes:
                answers[tuple(key.split(": ", 1))] = recipes[key], held.get_tensor(key)
            else:
                kind, name, tensor = key.split("/")
                models.setdefault(kind, {}).setdefault(name, {})[tensor] = held.get_tensor(key)
    return models, answers
