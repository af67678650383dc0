"""Rows of a data set, the same from every source.

Texts have single blanks, images are bytes; a split is in the order of its rows' SHA-256 and is held
to the digest in the manifest. Rows are told into splits by the source, or, where a source divides
them otherwise, by a committed index of digests.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from .manifests import SPLITS, ManifestError

KEY = 5  # bytes of a row's SHA-256 that the index keeps


def counted(manifest) -> bool:
    """Whether the manifest has digests of the rows."""
    return manifest.kind == "dataset" and "rows" in manifest.splits["train"]


def read(manifest, source, files: dict[str, Path]):
    """Verified files of a source as ``datasets.DatasetDict``.

    Raises: ManifestError when the rows are others than the manifest's.
    """
    if not counted(manifest):
        return _as_filed(manifest, source, files)
    reader = _from_arrays if source.files[0].path.endswith(".npz") else _from_tables
    groups = reader(manifest, source, files)
    chosen = (
        _by_index(manifest, source, groups[None]) if None in groups else _by_split(manifest, groups)
    )
    splits = {split: sorted(chosen[split], key=lambda row: row[0]) for split in SPLITS}
    for split, found in splits.items():
        wanted, digest = (
            manifest.splits[split],
            hashlib.sha256(b"".join(row[0] for row in found)).hexdigest(),
        )
        if (len(found), digest) != (wanted["rows"], wanted["sha256"]):
            raise ManifestError(
                f"{manifest.name}: {source.id}: {split}: expected {wanted['rows']} rows of sha256 {wanted['sha256']}, found "
                f"{len(found)} of {digest}; these are other rows, so use another source"
            )
    return _dataset(manifest, splits)


def _row(content, label: int):
    """(SHA-256 of label and content, content, label): a text with single blanks, or an image as
    uint8."""
    if isinstance(content, str):
        content = " ".join(content.split())
        head, body = "text", content.encode()
    else:
        content = np.ascontiguousarray(content)
        head, body = f"{content.dtype} {content.shape}", content.tobytes()
    return hashlib.sha256(f"{label} {head}\n".encode() + body).digest(), content, label


def _from_arrays(manifest, source, files):
    """Split -> rows of .npz files with x_SPLIT, y_SPLIT and class_names."""
    groups = {}
    for path in files.values():
        with np.load(path, allow_pickle=False) as arrays:
            _same_labels(manifest, source, arrays["class_names"].tolist())
            for split in SPLITS:
                if f"x_{split}" in arrays:
                    pairs = zip(arrays[f"x_{split}"], arrays[f"y_{split}"].tolist(), strict=True)
                    groups.setdefault(split, []).extend(
                        _row(image, label) for image, label in pairs
                    )
    return groups


def _same_labels(manifest, source, found):
    if found != manifest.extra["labels"]:
        raise ManifestError(
            f"{manifest.name}: {source.id}: expected the labels {manifest.extra['labels']}, found {found}"
        )


def _from_tables(manifest, source, files):
    """Split -> rows of tables; the split is named by a column or by the file, or else None."""
    from datasets import Image

    groups = {}
    columns = {
        name: source.extra.get("columns", {}).get(name, name) for name in manifest.extra["columns"]
    }
    content = next(name for name in ("text", "image") if name in columns)
    parts = re.findall(
        r"{(\w+)}", columns[content]
    )  # of a text that the source has in several columns
    for file in source.files:
        table = _table(files[file.path])
        for name in parts or columns.values():
            if name not in table.column_names:
                found = ", ".join(table.column_names)
                raise ManifestError(
                    f"{manifest.name}: {source.id}: {file.path}: expected a column {name}, found {found}"
                )
        if content == "image":
            table = table.cast_column(columns[content], Image())
        labels = _labels(manifest, source, table, columns["label"])
        splits = table["split"] if source.kind == "mirror" else [file.split] * len(table)
        items = (
            [columns[content].format(**row) for row in table] if parts else table[columns[content]]
        )
        for item, label, split in zip(items, labels, splits, strict=True):
            if label is not None:
                groups.setdefault(split, []).append(
                    _row(item if content == "text" else np.asarray(item), label)
                )
    return groups


def _table(path: Path):
    """A parquet or JSON-lines file as ``datasets.Dataset``, in memory, with the features its header
    declares."""
    import datasets
    import pyarrow.json
    import pyarrow.parquet

    return datasets.Dataset(
        pyarrow.json.read_json(path)
        if path.suffix == ".jsonl"
        else pyarrow.parquet.read_table(path)
    )


def _labels(manifest, source, table, column):
    """Our number of every row's label, by its name where the table or the source has names; None
    for a label that is not ours."""
    ours, renamed, feature = (
        manifest.extra["labels"],
        source.extra.get("labels", {}),
        table.features[column],
    )
    names = (
        feature.names
        if hasattr(feature, "names")
        else None
        if feature.dtype == "string" or renamed
        else ours
    )
    numbers = {name: number for number, name in enumerate(ours)}
    values = (
        table[column]
        if names is None
        else [names[value] if 0 <= value < len(names) else None for value in table[column]]
    )
    return [numbers.get(renamed.get(str(value), str(value))) for value in values]


def _by_index(manifest, source, found):
    """The rows that the committed index names, wherever the source keeps them."""
    keys = np.fromfile(manifest.path.parent / "index" / f"{manifest.name}.bin", np.uint8).reshape(
        -1, KEY
    )
    keys, known = [key.tobytes() for key in keys], {row[0][:KEY]: row for row in found}
    chosen, start = {}, 0
    for split in SPLITS:
        wanted = keys[start : start + manifest.splits[split]["rows"]]
        chosen[split] = [known[key] for key in wanted if key in known]
        start += len(wanted)
        if len(chosen[split]) < len(wanted):
            raise ManifestError(
                f"{manifest.name}: {source.id}: {split}: expected {len(wanted)} rows of the index, found {len(chosen[split])} among "
                f"{len(known)}; these are other rows, so use another source"
            )
    return chosen


def _by_split(manifest, groups):
    """Held-out validation where the manifest asks for it; no training or validation row that a
    later split holds too."""
    _all_there(manifest, groups)
    test, train = groups["test"], _without(groups["train"], groups["test"])
    if held_out := manifest.splits["validation"].get("held_out"):
        train.sort(key=lambda row: row[0])
        chosen = held(len(train), **held_out)
        validation = [train[i] for i in sorted(chosen)]
        train = [row for i, row in enumerate(train) if i not in chosen]
    else:
        validation = _without(groups["validation"], test)
    return {"train": _without(train, validation), "validation": validation, "test": test}


def _all_there(manifest, splits):
    drawn = {"validation"} if "held_out" in manifest.splits["validation"] else set()
    for split in (split for split in SPLITS if split not in splits and split not in drawn):
        raise ManifestError(
            f"{manifest.name}: expected rows of {split}, found only {', '.join(map(str, splits))}; correct the manifest"
        )


def held(rows: int, seed: int, share: float) -> set[int]:
    """Positions of the training rows that are held out for validation: the head of a seeded
    permutation."""
    return set(np.random.RandomState(seed).permutation(rows)[: int(share * rows)].tolist())


def _without(rows, others):
    """The rows whose content no other has, texts compared without case, blanks and punctuation."""
    seen = {_bare(row[1]) for row in others}
    return [row for row in rows if _bare(row[1]) not in seen]


def _bare(content):
    return (
        re.sub(r"[\W_]+", "", content.casefold()) or content
        if isinstance(content, str)
        else content.tobytes()
    )


def _dataset(manifest, splits):
    from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Features, Value

    column, first = (
        ("text" if "text" in manifest.extra["columns"] else "image"),
        splits["train"][0][1],
    )
    shaped = lambda: (Array2D if first.ndim == 2 else Array3D)(first.shape, str(first.dtype))
    features = Features(
        {
            column: Value("string") if column == "text" else shaped(),
            "label": ClassLabel(names=manifest.extra["labels"]),
        }
    )
    tables = {
        split: {column: [row[1] for row in found], "label": [row[2] for row in found]}
        for split, found in splits.items()
    }
    return DatasetDict(
        {split: Dataset.from_dict(table, features=features) for split, table in tables.items()}
    )


def _as_filed(manifest, source, files):
    """Splits as the files hold them, in their order, read from disk as needed; validation held out
    where the manifest asks for it."""
    from datasets import DatasetDict, load_dataset

    kind = {".parquet": "parquet", ".jsonl": "json"}[Path(source.files[0].path).suffix]
    parts = {
        split: [str(files[f.path]) for f in source.files if f.split == split] for split in SPLITS
    }
    parts = {split: paths for split, paths in parts.items() if paths}
    _all_there(manifest, parts)
    loaded = load_dataset(kind, data_files=parts)
    columns = {source.extra["columns"].get(name, name): name for name in manifest.extra["columns"]}
    loaded = loaded.select_columns(list(columns)).rename_columns(
        {theirs: ours for theirs, ours in columns.items() if theirs != ours}
    )
    if manifest.extra["labels"]:
        _same_labels(
            manifest,
            source,
            [
                source.extra["labels"].get(name, name)
                for name in loaded["train"].features["label"].names
            ],
        )
    if held_out := manifest.splits["validation"].get("held_out"):
        train = loaded["train"]
        chosen = held(len(train), **held_out)
        rest = [i for i in range(len(train)) if i not in chosen]
        loaded = {
            "train": train.select(rest),
            "validation": train.select(sorted(chosen)),
            "test": loaded["test"],
        }
    return DatasetDict({split: loaded[split] for split in SPLITS})
