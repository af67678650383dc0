"""Rows of a data set, the same from every source.

Texts have single blanks, images are bytes; a split is in the order of its rows' SHA-256 and is held
to the digest in the manifest. Rows are told into splits by the source, or, where a source divides
them otherwise, by a committed index of digests.
"""

import hashlib
import re
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

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
    if None in groups:
        chosen = _by_index(manifest, source, groups[None])
    else:
        chosen = _by_split(manifest, groups)
    splits = {}
    for split in SPLITS:
        rows = sorted(chosen[split], key=attrgetter("sha256"))
        digest = hashlib.sha256(b"".join(row.sha256 for row in rows)).hexdigest()
        wanted = manifest.splits[split]
        if (len(rows), digest) != (wanted["rows"], wanted["sha256"]):
            raise ManifestError(
                f"{manifest.name}: {source.id}: {split}: expected {wanted['rows']} rows of sha256 "
                f"{wanted['sha256']}, found {len(rows)} of {digest}; "
                "these are other rows, so use another source"
            )
        splits[split] = rows
    return _dataset(manifest, splits)


class Row(NamedTuple):
    """A row of a data set: SHA-256 of label and content; a text, or an image as uint8; our number
    of the label."""

    sha256: bytes
    content: str | np.ndarray
    label: int


def _row(content, label: int) -> Row:
    """The row of a text, whose blanks become single ones, or of an image."""
    if isinstance(content, str):
        content = " ".join(content.split())
        head, body = "text", content.encode()
    else:
        content = np.ascontiguousarray(content)
        head, body = f"{content.dtype} {content.shape}", content.tobytes()
    return Row(hashlib.sha256(f"{label} {head}\n".encode() + body).digest(), content, label)


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


def _same_labels(manifest, source, labels):
    if labels != manifest.extra["labels"]:
        raise ManifestError(
            f"{manifest.name}: {source.id}: expected the labels {manifest.extra['labels']}, "
            f"found {labels}"
        )


def _from_tables(manifest, source, files):
    """Split -> rows of tables; the split is named by a column or by the file, or else None."""
    from datasets import Image

    groups = {}
    columns = {
        name: source.extra.get("columns", {}).get(name, name) for name in manifest.extra["columns"]
    }
    content = next(name for name in ("text", "image") if name in columns)
    # of a text that the source has in several columns
    parts = re.findall(r"{(\w+)}", columns[content])
    for file in source.files:
        table = _table(files[file.path])
        for name in parts or columns.values():
            if name not in table.column_names:
                raise ManifestError(
                    f"{manifest.name}: {source.id}: {file.path}: expected a column {name}, "
                    f"found {', '.join(table.column_names)}"
                )
        if content == "image":
            table = table.cast_column(columns[content], Image())
        labels = _labels(manifest, source, table, columns["label"])
        splits = table["split"] if source.kind == "mirror" else [file.split] * len(table)
        items = table[columns[content]] if not parts else _joined(table, columns[content])
        for item, label, split in zip(items, labels, splits, strict=True):
            if label is not None:
                item = item if content == "text" else np.asarray(item)
                groups.setdefault(split, []).append(_row(item, label))
    return groups


def _joined(table, template: str) -> list[str]:
    """Texts that a source has in several columns, as a template of their names puts them
    together."""
    return [template.format(**row) for row in table]


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
    ours, renamed = manifest.extra["labels"], source.extra.get("labels", {})
    names, values = _names_of(table.features[column], ours, renamed), table[column]
    if names is not None:
        values = [names[value] if 0 <= value < len(names) else None for value in values]
    numbers = {name: number for number, name in enumerate(ours)}
    return [numbers.get(renamed.get(str(value), str(value))) for value in values]


def _names_of(feature, ours: list[str], renamed: dict) -> list[str] | None:
    """Names of the numbers in a column of labels; None where the column has names itself, or
    numbers that the source renames."""
    if hasattr(feature, "names"):
        return feature.names
    return None if feature.dtype == "string" or renamed else ours


def _by_index(manifest, source, rows: list[Row]):
    """The rows that the committed index names, wherever the source keeps them."""
    path = manifest.path.parent / "index" / f"{manifest.name}.bin"
    keys = [key.tobytes() for key in np.fromfile(path, np.uint8).reshape(-1, KEY)]
    known = {row.sha256[:KEY]: row for row in rows}
    chosen, start = {}, 0
    for split in SPLITS:
        wanted = keys[start : start + manifest.splits[split]["rows"]]
        chosen[split] = [known[key] for key in wanted if key in known]
        start += len(wanted)
        if len(chosen[split]) < len(wanted):
            raise ManifestError(
                f"{manifest.name}: {source.id}: {split}: expected {len(wanted)} rows of the index, "
                f"found {len(chosen[split])} among {len(known)}; "
                "these are other rows, so use another source"
            )
    return chosen


def _by_split(manifest, groups):
    """Held-out validation where the manifest asks for it; no training or validation row that a
    later split holds too."""
    _all_there(manifest, groups)
    test, train = groups["test"], _without(groups["train"], groups["test"])
    if held_out := manifest.splits["validation"].get("held_out"):
        train.sort(key=attrgetter("sha256"))
        chosen = held_out_rows(len(train), **held_out)
        validation = [train[i] for i in sorted(chosen)]
        train = [row for i, row in enumerate(train) if i not in chosen]
    else:
        validation = _without(groups["validation"], test)
    return {"train": _without(train, validation), "validation": validation, "test": test}


def _all_there(manifest, splits):
    drawn = {"validation"} if "held_out" in manifest.splits["validation"] else set()
    for split in SPLITS:
        if split not in splits and split not in drawn:
            raise ManifestError(
                f"{manifest.name}: expected rows of {split}, "
                f"found only {', '.join(map(str, splits))}; correct the manifest"
            )


def held_out_rows(rows: int, seed: int, share: float) -> set[int]:
    """Positions of the training rows that are held out for validation: the head of a seeded
    permutation."""
    order = np.random.RandomState(seed).permutation(rows)
    return set(order[: int(share * rows)].tolist())


def _without(rows, others):
    """The rows whose content no other has, texts compared without case, blanks and punctuation."""
    seen = {_bare(row.content) for row in others}
    return [row for row in rows if _bare(row.content) not in seen]


def _bare(content):
    """What tells contents apart: a text without case, blanks and punctuation, or an image's
    bytes."""
    if isinstance(content, str):
        return re.sub(r"[\W_]+", "", content.casefold()) or content
    return content.tobytes()


def _dataset(manifest, splits):
    from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Features, Value

    first, labels = splits["train"][0].content, ClassLabel(names=manifest.extra["labels"])
    if "text" in manifest.extra["columns"]:
        column, kind = "text", Value("string")
    else:
        array = Array2D if first.ndim == 2 else Array3D
        column, kind = "image", array(first.shape, str(first.dtype))
    features, tables = Features({column: kind, "label": labels}), {}
    for split, rows in splits.items():
        columns = {column: [row.content for row in rows], "label": [row.label for row in rows]}
        tables[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(tables)


def _as_filed(manifest, source, files):
    """Splits as the files hold them, in their order, read from disk as needed; validation held out
    where the manifest asks for it."""
    from datasets import DatasetDict, load_dataset

    kind = {".parquet": "parquet", ".jsonl": "json"}[Path(source.files[0].path).suffix]
    parts = {}
    for split in SPLITS:
        paths = [str(files[file.path]) for file in source.files if file.split == split]
        if paths:
            parts[split] = paths
    _all_there(manifest, parts)
    loaded = load_dataset(kind, data_files=parts)
    columns = {source.extra["columns"].get(name, name): name for name in manifest.extra["columns"]}
    renamed = {theirs: ours for theirs, ours in columns.items() if theirs != ours}
    loaded = loaded.select_columns(list(columns)).rename_columns(renamed)
    if manifest.extra["labels"]:
        theirs = loaded["train"].features["label"].names
        ours = [source.extra["labels"].get(name, name) for name in theirs]
        _same_labels(manifest, source, ours)
    if held_out := manifest.splits["validation"].get("held_out"):
        train = loaded["train"]
        chosen = held_out_rows(len(train), **held_out)
        rest = [i for i in range(len(train)) if i not in chosen]
        loaded = {
            "train": train.select(rest),
            "validation": train.select(sorted(chosen)),
            "test": loaded["test"],
        }
    return DatasetDict({split: loaded[split] for split in SPLITS})
