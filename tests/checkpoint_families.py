"""Bases and experts on disk that the tests of the command line share, a Hub that serves them, and
what runs the command, looks at its output and damages files."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import Hub

from qpmerge_lite.companion import cli

transformers = pytest.importorskip(
    "transformers", reason="the hub extra, which makes and runs checkpoints, is not here"
)
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[1]
SIZE = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(38))]
EXPERTS = ("first", "second")


def tokenizer():
    model = tokenizers.models.WordLevel(
        {word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"
    )
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]"
    )


def bert():
    return transformers.BertModel(transformers.BertConfig(max_position_embeddings=16, **SIZE))


def llama():
    """Tied, in half precision."""
    config = transformers.LlamaConfig(
        max_position_embeddings=16, num_key_value_heads=1, tie_word_embeddings=True, **SIZE
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def tuned(model, seed):
    """A copy with noise on every parameter."""
    expert, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.05 * noise).to(parameter.dtype)
    return expert


def texts(seed, count=10):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    draws = [torch.randint(2, 40, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(WORDS[place] for place in draw) for draw in draws]


class Family:
    """A base and two experts on disk, and in memory."""

    def __init__(self, root, make, **options):
        torch.manual_seed(0)
        self.root, self.model = root, make().eval()
        self.base, self.files = root / "base", {}
        self.experts = {name: tuned(self.model, seed) for seed, name in enumerate(EXPERTS, 1)}
        for name, model in {"base": self.model, **self.experts}.items():
            model.save_pretrained(root / name, **options)
            tokenizer().save_pretrained(root / name)
        (root / "base" / "chat_template.jinja").write_text("{{ messages }}")
        self.states = {name: model.state_dict() for name, model in self.experts.items()}
        for seed, name in enumerate(EXPERTS, 5):
            self.files[name] = root / f"{name}.jsonl"
            rows = (json.dumps({"text": text, "label": 1}) for text in texts(seed))
            self.files[name].write_text("\n".join(rows) + "\n\n", encoding="utf-8")

    def copied(self, root):
        """The same in another place."""
        shutil.copytree(self.root, root)
        other = copy.copy(self)
        other.root, other.base = root, root / "base"
        other.files = {name: root / file.name for name, file in self.files.items()}
        return other

    @property
    def folders(self):
        return [str(self.root / name) for name in ("base", *EXPERTS)]

    @property
    def given(self):
        """--calibration for every expert."""
        pairs = [f"{name}={file}" for name, file in self.files.items()]
        return [word for pair in pairs for word in ("--calibration", pair)]

    def calibration(self, batch_size=8):
        """What the files say, made by hand."""
        words = {word: number for number, word in enumerate(WORDS)}
        made = {}
        for seed, name in enumerate(EXPERTS, 5):
            rows = [[words[word] for word in text.split()] for text in texts(seed)]
            batches = []
            for start in range(0, len(rows), batch_size):
                part = [torch.tensor(row) for row in rows[start : start + batch_size]]
                ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
                ones = [torch.ones_like(row) for row in part]
                mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
                batches.append({"input_ids": ids, "attention_mask": mask})
            made[name] = batches
        return made


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "bert": Family(root / "bert", bert),
        "llama": Family(root / "llama", llama, max_shard_size="1KB"),
    }


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs, to be damaged."""
    return families["bert"].copied(tmp_path / "bert")


def run(capsys, *words):
    """(exit status, what was printed, what was complained of)."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def state_of(folder):
    """Tensors of a folder, read by the library of the format."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= safetensors.load_file(path)
    return state


def assert_same(folder, expected):
    found = state_of(folder)
    assert found and found.keys() <= expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and its client with an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


DENSE = "pooler.dense.weight"
# a merge in a process that is killed when it begins its second file
KILLED = """
import os, signal, sys
from qpmerge_lite.checkpoints import tensors
from qpmerge_lite.__main__ import main
write, files = tensors.Shards.write, set()

def killed(shards, name, value):
    files.add(shards.missing[name])
    if len(files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(shards, name, value)

tensors.Shards.write = killed
main(sys.argv[1:])
"""


def change(folder, file="config.json", **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def reshape(folder, name, value):
    path = folder / "model.safetensors"
    state = safetensors.load_file(path)
    state[name] = value(state[name]).contiguous()
    safetensors.save_file(state, path, metadata={"format": "pt"})
