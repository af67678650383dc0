"""What the model card of a merge says of its heads: how to load them without this package."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..findings import shortened

FOLDER, WEIGHTS = "heads", "head.safetensors"
SHOWN = 8  # labels of a head that a card names


def loading(name: str, head: Mapping) -> str:
    """The lines of Python that load a merge with one of its heads, with transformers alone.

    Args:
        name: of the expert; ``head``: what ``files.write_heads`` tells of its head.
    """
    kind = head["class"]
    more = ", ignore_mismatched_sizes=True" if head["replaced"] else ""
    return f"""\
from safetensors.torch import load_file
from transformers import AutoConfig, {kind}

merged = "path/to/this/folder"
head = merged + {f"/{FOLDER}/{name}"!r}
config = AutoConfig.from_pretrained(head)
model = {kind}.from_pretrained(merged, config=config{more})
# what was reported as newly initialised, the head, is read now
model.load_state_dict(load_file(f"{{head}}/{WEIGHTS}"), strict=False)"""


def about_heads(manifest: Mapping) -> list[str]:
    """Lines of a model card on the heads of a merge, by its manifest; none where it has none."""
    heads = manifest["heads"]
    if not heads:
        return []
    first = next(iter(heads))
    lines = [
        "",
        "## Heads",
        "",
        "The backbone is merged. Every expert's own head is kept as it is, beside it:",
        "",
        "| head | class | labels |",
        "|---|---|---|",
    ]
    for name, head in heads.items():
        labels = shortened(head["labels"].values(), SHOWN)
        cells = [f"{FOLDER}/{name}", head["class"], labels]
        lines.append("| " + " | ".join(map(_in_table, cells)) + " |")
    lines += ["", f"With {first}'s:", "", "```python", loading(first, heads[first]), "```"]
    if manifest["kept"]:
        names = shortened(manifest["kept"])
        lines += ["", f"Not merged, the base's as they are: {names}."]
    return lines


def _in_table(text: str) -> str:
    """A text as a cell of a table of Markdown has it."""
    return escape(text, quote=False).replace("|", "\\|")
