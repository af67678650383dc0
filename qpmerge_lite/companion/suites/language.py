"""The embedded language suite: naming the language of three words, written as the base never saw
them.

Eight tasks tell related languages apart, character by character. Words come from the frequency
lists of ``wordfreq``; a word belongs to one split in every language, and validation and test texts
are the same for every seed; training texts vary with it.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from .encoders import TextTransformer
from .training import Recipe, seeded, shipped

WEIGHTS = Path(__file__).parent / "weights" / "language_base.safetensors"
MANIFEST = "smoke-language"
RECIPE = Recipe(steps=220, batch=64, rate=2e-3)
LAYERS = ("blocks.0.attention.value", "blocks.1.up", "blocks.2.up")
LAYER_RECIPE = Recipe(steps=80, batch=64, rate=1e-2)
SPLITS = {"train": 4096, "validation": 512, "test": 1024}
SHARES = {"test": 0.2, "validation": 0.1}  # of the words; the rest trains base and experts
LANGUAGES = (
    "ar bg ca cs da de el en es fa fi fil fr he hu id is it "
    "lt lv mk ms nb nl pl pt ro ru sh sk sl sv tr uk ur vi"
).split()
TOP, SHORTEST, LONGEST, WORDS = 8000, 3, 8, 3
LENGTH = WORDS * (LONGEST + 1) - 1  # characters of a text, spaces included
PAD, MASK, MASKED = 0, 1, 0.2


def _inside_out(word: str) -> str:
    """Its letters from the middle to both ends in turn."""
    outside_in = "".join(map("".join, zip(word, reversed(word))))[: len(word)]
    return outside_in[::-1]


def _per_word(change):
    return lambda text: " ".join(map(change, text.split(" ")))


def _letters(plain: str, shifted: str):
    return lambda text: text.translate(str.maketrans(plain, shifted))


# Ways of writing that the base never saw.
STYLES = {
    "backwards": lambda text: text[::-1],
    "words backwards": _per_word(lambda word: word[::-1]),
    "inside out": _per_word(_inside_out),
    "odd letters first": _per_word(lambda word: word[::2] + word[1::2]),
    "vowels shifted": _letters("aeiou", "eioua"),
    "consonants shifted": _letters("bpdtgkvfzsmnlr", "pbtdkgfvsznmrl"),
}


@dataclass(frozen=True)
class Task:
    """The languages to tell apart, and the styles their words are written in, one after the
    other."""

    languages: str
    styles: tuple[str, ...]


DEFINITIONS = {
    "romance": Task("es fr it pt ro", ("words backwards",)),
    "iberian": Task("es pt ca", ("vowels shifted", "words backwards")),
    "germanic": Task("de nl sv da is", ("words backwards",)),
    "nordic": Task("sv da nb", ("consonants shifted", "words backwards")),
    "slavic": Task("pl cs sk sl sh", ("backwards",)),
    "cyrillic": Task("ru uk bg mk", ("inside out",)),
    "danube": Task("de hu sk ro sh", ("odd letters first",)),
    "czech": Task("cs sk", ("odd letters first",)),
}
TASKS = list(DEFINITIONS)
N_CLASSES = {name: len(task.languages.split()) for name, task in DEFINITIONS.items()}


def split_of(word: str) -> str:
    """The split a word belongs to, in whatever language it occurs."""
    place = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") / 2**32
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


@cache
def words(language: str) -> tuple[str, ...]:
    """The most frequent words of a language that have letters only, 3 to 8 of them."""
    from wordfreq import top_n_list

    return tuple(
        w
        for w in top_n_list(language, TOP, wordlist="small")
        if w.isalpha() and SHORTEST <= len(w) <= LONGEST
    )


@cache
def lexicon(task: str) -> dict[str, dict[str, list[str]]]:
    """split -> language -> words of a task: none shared by two of its languages, none English."""
    languages = DEFINITIONS[task].languages.split()
    times = Counter(w for language in languages for w in set(words(language)))
    english = set(words("en"))
    pools: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        pools[split] = {language: [] for language in languages}
    for language in languages:
        for word in words(language):
            if times[word] == 1 and word not in english:
                pools[split_of(word)][language].append(word)
    return pools


def text(task: str, split: str, label: int, generator: Generator) -> str:
    """Three words of a language, drawn with replacement, in the styles of the task."""
    pool = lexicon(task)[split][DEFINITIONS[task].languages.split()[label]]
    chosen = torch.randint(len(pool), (WORDS,), generator=generator)
    return reduce(
        lambda words, style: STYLES[style](words),
        DEFINITIONS[task].styles,
        " ".join(pool[i] for i in chosen),
    )


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task: columns ``text`` and ``label``, classes in turn."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    names = DEFINITIONS[task].languages.split()
    schema, splits = Features(text=Value("string"), label=ClassLabel(names=names)), {}
    for split, count in SPLITS.items():
        generator = seeded(seed if split == "train" else 0, task, split)
        labels = [i % len(names) for i in range(count)]
        splits[split] = Dataset.from_dict(
            {"text": [text(task, split, label, generator) for label in labels], "label": labels},
            features=schema,
        )
    return DatasetDict(splits)


@cache
def alphabet() -> dict[str, int]:
    """Identifier of every character of the word lists, space included; 0 pads and 1 masks."""
    letters = set()
    for language in LANGUAGES:
        letters.update(*words(language))
    return {c: i + 2 for i, c in enumerate([" ", *sorted(letters)])}


def encode(texts) -> Tensor:
    """Character identifiers (N, LENGTH) int64 of texts of known characters, padded with 0."""
    known, rows = alphabet(), []
    for text in texts:
        row = [known[character] for character in text]
        rows.append(row + [PAD] * (LENGTH - len(row)))
    return torch.tensor(rows)


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: ``input_ids`` and ``attention_mask`` (B,
    LENGTH)."""
    ids = encode(rows["text"])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def build() -> TextTransformer:
    """The encoder with random weights."""
    return TextTransformer(
        characters=len(alphabet()) + 2, length=LENGTH, width=64, depth=4, heads=4, ratio=2
    )


def base() -> tuple[TextTransformer, str]:
    """The shipped encoder, in float32, and the SHA-256 of its file."""
    return shipped(build(), WEIGHTS)


@cache
def pretraining_data() -> tuple[Tensor, Tensor]:
    """Training words of all languages as identifiers (N, 8) padded with 0, and the language (N,) of
    each."""
    chosen, languages = [], []
    for number, language in enumerate(LANGUAGES):
        training = [word for word in words(language) if split_of(word) == "train"]
        chosen += training
        languages += [number] * len(training)
    return encode(chosen)[:, :LONGEST], torch.tensor(languages)


def pretraining_head(encoder: TextTransformer) -> nn.Linear:
    """Scores of every character, for masked ones, and of every language, for whole texts."""
    return nn.Linear(
        encoder.norm.normalized_shape[0], encoder.embed.num_embeddings + len(LANGUAGES)
    )


def pretraining_batch(encoder, head, generator: Generator, size: int) -> tuple[Tensor, Tensor]:
    """Scores and targets of the masked characters, and of the language, of ``size`` texts of three
    words."""
    ids, language = pretraining_data()
    first, count = torch.searchsorted(language, torch.arange(len(LANGUAGES))), language.bincount()
    chosen = torch.randint(len(LANGUAGES), (size, 1), generator=generator)
    picks = first[chosen] + (torch.rand(size, WORDS, generator=generator) * count[chosen]).long()
    spaced = nn.functional.pad(ids[picks], (0, 1), value=alphabet()[" "])
    gapped = spaced.flatten(1)[:, :-1]  # padding behind every word
    texts = gapped.gather(1, (gapped == PAD).to(torch.uint8).sort(dim=1, stable=True).indices)
    hidden = (torch.rand(texts.shape, generator=generator) < MASKED) & (texts != PAD)
    mask = (texts != PAD).long()
    states = encoder.states(texts.masked_fill(hidden, MASK), mask)
    scores = head(torch.cat([states[hidden], encoder.pool(states, mask)]))
    return scores, torch.cat([texts[hidden], encoder.embed.num_embeddings + chosen[:, 0]])
