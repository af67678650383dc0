"""Published accuracies of the public checkpoints, set beside what was measured here."""

from pathlib import Path


def read(path: Path) -> dict:
    """Family -> source, tasks and rows of ``book/published.yml``."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def table(family: str, published: dict, records: dict) -> str:
    """Markdown table of a family, in per cent: published figures, and measured / published /
    difference where all of a row's are recorded.

    Args:
        published: that family's part of :func:`read`.
        records: id -> ``records.Record``; ``family.method.task.accuracy`` are looked up.
    """
    tasks = published["tasks"]
    lines = [["", *(task.replace("_", " ") for task in tasks), "mean"], ["---"] * (len(tasks) + 2)]
    for row in published["rows"]:
        values = row["values"]
        ids = [f"{family}.{row.get('entry')}.{task}.accuracy" for task in tasks]
        measured = (
            [100 * records[id].value for id in ids]
            if set(ids) <= records.keys()
            else [None] * len(tasks)
        )
        pairs = list(zip(measured, values, strict=True))
        pairs.append(
            (None if None in measured else sum(measured) / len(tasks), sum(values) / len(tasks))
        )
        lines.append(
            [
                row["label"] + (f" ({row['source']})" if "source" in row else ""),
                *(_cell(*pair) for pair in pairs),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(measured, published) -> str:
    return (
        f"{published:.1f}"
        if measured is None
        else f"{measured:.1f} / {published:.1f} / {measured - published:+.1f}"
    )
