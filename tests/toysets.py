"""A small set of texts, one of images and a family of checkpoints, with manifests, as a mirror and
as the Hub hold them."""

import hashlib
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LABELS = ["no", "yes", "maybe"]


def texts():
    """(text, label, split): 60 training rows, of which 40 are 20 twice but for case, and 12 test
    rows, two of them in train too."""
    rows = [(f"{word}  number {i}", i % 3, "train") for i in range(20) for word in ("text", "Text")]
    rows += [(f"line {i}", i % 3, "train") for i in range(18)] + [
        ("Some Test, 1!", 0, "train"),
        ("some test 2", 1, "train"),
    ]
    return rows + [(f"some test {i}", i % 3, "test") for i in range(12)]


def images():
    """(uint8 image, label, split): 40 training rows and 10 test rows."""
    draw = np.random.default_rng(0)
    return [
        (draw.integers(0, 256, (5, 4), dtype=np.uint8), i % 3, "train" if i < 40 else "test")
        for i in range(50)
    ]


def digest(content, label):
    """Of a row, as ``data_manifests/README.md`` defines it."""
    if isinstance(content, str):
        return hashlib.sha256(f"{label} text\n{' '.join(content.split())}".encode()).digest()
    return hashlib.sha256(f"{label} uint8 {content.shape}\n".encode() + content.tobytes()).digest()


def divided(rows):
    """Split -> [(digest, content, label)] in order, as ``data_manifests/README.md`` defines them; a
    tenth held out by seed 0."""
    rows = [(digest(content, label), content, label, split) for content, label, split in rows]
    bare = lambda content: (
        "".join(filter(str.isalnum, content.lower()))
        if isinstance(content, str)
        else content.tobytes()
    )
    held = {bare(row[1]) for row in rows if row[3] == "test"}
    train = sorted(
        (row[:3] for row in rows if row[3] == "train" and bare(row[1]) not in held),
        key=lambda row: row[0],
    )
    chosen = set(np.random.RandomState(0).permutation(len(train))[: len(train) // 10].tolist())
    validation = [row for i, row in enumerate(train) if i in chosen]
    return {
        "train": [row for row in train if bare(row[1]) not in {bare(row[1]) for row in validation}],
        "validation": validation,
        "test": sorted((row[:3] for row in rows if row[3] == "test"), key=lambda row: row[0]),
    }


def entry(path, content, **more):
    """A file of a manifest."""
    return {
        "path": path,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **more,
    }


def parquet(columns, features=None):
    """Bytes of a parquet file; with features, as ``datasets`` writes them."""
    stream = io.BytesIO()
    if features is None:
        pq.write_table(pa.table(columns), stream)
    else:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(stream)
    return stream.getvalue()


def mirrored(rows):
    """Name and bytes of the mirror's file: a table of texts, or arrays of images."""
    if isinstance(rows[0][0], str):
        return "toy.parquet", parquet(
            {name: [row[i] for row in rows] for i, name in enumerate(("text", "label", "split"))}
        )
    stream = io.BytesIO()
    parts = {s: [row for row in rows if row[2] == s] for s in ("train", "test")}
    arrays = {f"x_{s}": np.stack([row[0] for row in part]) for s, part in parts.items()}
    np.savez(
        stream,
        class_names=np.array(LABELS),
        **arrays,
        **{f"y_{s}": np.array([row[1] for row in part]) for s, part in parts.items()},
    )
    return "toy.npz", stream.getvalue()


def on_the_hub(rows, others=3):
    """Bytes of a parquet file with the rows shuffled among others, labels renamed and in another
    order, as a repository might have it."""
    kind = "text" if isinstance(rows[0][0], str) else "image"
    more = [("another text" if kind == "text" else np.zeros((5, 4), np.uint8), 0)] * others
    rows = [(content, label) for content, label, _ in rows] + more
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))] + [
        (rows[0][0], 3)
    ]  # a label that is not ours
    features = datasets.Features(
        content=datasets.Value("string") if kind == "text" else datasets.Image(),
        answer=datasets.ClassLabel(names=["MAYBE", "yes", "no", "other"]),
    )
    return parquet(
        {"content": [row[0] for row in rows], "answer": [[2, 1, 0, 3][row[1]] for row in rows]},
        features,
    )


def write(folder, rows, *sources, counted=True, **change):
    """A manifest toy.yaml of these rows and sources, with its index."""
    splits, kind = divided(rows), "text" if isinstance(rows[0][0], str) else "image"
    described = {name: {"made": "by hand"} for name in splits}
    described["validation"]["held_out"] = {"seed": 0, "share": 0.1}
    if counted:
        for name, part in splits.items():
            described[name] |= {
                "rows": len(part),
                "sha256": hashlib.sha256(b"".join(row[0] for row in part)).hexdigest(),
            }
    content = {
        "schema": 1, "kind": "dataset", "name": "toy", "tier": "standard", "description": "a "
        "toy", "licence": "MIT", "citation": "ours",
        "sources": list(sources), "columns": {kind: "what is classified", "label": "its class"},
        "labels": LABELS, "splits": described,
        "leakage": [], "elsewhere": ["the attic has other rows"], **change,
    }  # fmt: skip
    (folder / "index").mkdir(parents=True, exist_ok=True)
    (folder / "index" / "toy.bin").write_bytes(
        b"".join(row[0][:5] for part in splits.values() for row in part)
    )
    (folder / "toy.yaml").write_text(dump(content))


def dump(content):
    """YAML laid out as the manifests of the repository are."""
    flow = lambda item: yaml.safe_dump([item], default_flow_style=True, width=10**6).strip()[1:-1]
    lines = []
    for name, value in content.items():
        if name == "sources":
            lines.append("sources:\n")
            for source in value:
                fields = [
                    f"{key}: {flow(item)}\n" for key, item in source.items() if key != "files"
                ]
                lines.append("  - " + "    ".join([*fields, "files:\n"]))
                for file in source["files"]:
                    lines.append(
                        "      - "
                        + "        ".join(f"{key}: {flow(item)}\n" for key, item in file.items())
                    )
        else:
            lines.append(yaml.safe_dump({name: value}, sort_keys=False))
    return "".join(lines)


def mirror_source(path, content):
    return {
        "id": "mirror",
        "kind": "mirror",
        "verified": True,
        "origin": "made here",
        "files": [entry(path, content)],
    }


def hub_source(*files, **change):
    renamed = {
        "columns": {"text": "content", "image": "content", "label": "answer"},
        "labels": {"MAYBE": "maybe"},
    }
    return {
        "id": "hub",
        "kind": "hub",
        "verified": False,
        "repo": "ours/toy",
        "revision": "main",
        **renamed,
        "files": list(files),
        **change,
    }
