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
        published_figures = [*values, sum(values) / len(tasks)]
        if set(ids) <= records.keys():
            measured = [100 * records[id].value for id in ids]
            measured.append(sum(measured) / len(tasks))
            cells = [_compared(*pair) for pair in zip(measured, published_figures, strict=True)]
        else:
            cells = [f"{figure:.1f}" for figure in published_figures]
        source = f" ({row['source']})" if "source" in row else ""
        lines.append([row["label"] + source, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _compared(measured: float, published: float) -> str:
    """measured / published / difference, in per cent."""
    return f"{measured:.1f} / {published:.1f} / {measured - published:+.1f}"
