"""What is found about checkpoints before they are merged, and the refusals made of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MergeError

ERROR, WARNING, INFO = "ERROR", "WARNING", "INFO"
LEVELS = (ERROR, WARNING, INFO)


@dataclass(frozen=True)
class Finding:
    """One thing to know about a checkpoint.

    Attributes:
        level: ``ERROR`` where no merge is made, ``WARNING`` where one is made that may not be what
            was meant, or ``INFO``.
        where: file, field or tensor.
        expected, found: what should be there, and what is.
        cure: what to do about it.
    """

    level: str
    where: str
    expected: str
    found: str
    cure: str

    @property
    def message(self) -> str:
        """The finding as a sentence, without its level."""
        return f"{self.where}: expected {self.expected}, found {self.found}; {self.cure}"

    def __str__(self) -> str:
        return f"{self.level} {self.message}"


class Refused(MergeError):
    """A refusal that names file, field or tensor, what was expected, what was found, and the cure;
    ``finding`` has these one by one."""

    def __init__(self, where, expected: str, found: str, cure: str):
        self.finding = Finding(ERROR, str(where), expected, found, cure)
        super().__init__(self.finding.message)


def shortened(names, count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    listed = [repr(name) for name in list(names)[:count]]
    more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it, as far as estimates go."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
