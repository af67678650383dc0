"""Calibration files in Parquet, read by pyarrow in pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from ..findings import Refused
from .records import Record, require

AT_ONCE = 64  # rows in memory, which may be pictures


class Parquet:
    """A file in Parquet. Nothing is unpickled.

    Args:
        path: the file.
        shown: what messages call it.
    Raises: Refused where pyarrow is not installed, or the file is no Parquet that it reads.
    """

    def __init__(self, path: Path, shown: str):
        self.path, self.shown = path, shown
        require("pyarrow", "which reads Parquet", 'write JSON lines, {"text": "…"} a line')
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            self._file = ParquetFile(path)
        except (OSError, ArrowException) as error:
            raise self._damaged(error) from error

    def count(self) -> int:
        """How many rows the file says it has."""
        return self._file.metadata.num_rows

    def records(self, numbers: Collection[int], fields: Collection[str]) -> Iterator[Record]:
        """Rows of some numbers, from 0 on and in their order.

        Raises: Refused for damaged pages.
        """
        from pyarrow import ArrowException

        names = self._file.schema_arrow.names
        wanted = [name for name in fields if name in names]
        others = [name for name in names if name not in wanted]
        chosen, start = sorted(set(numbers)), 0
        try:
            for batch in self._file.iter_batches(AT_ONCE, columns=wanted):
                here = [number for number in chosen if start <= number < start + len(batch)]
                for number in here:
                    (values,) = batch.slice(number - start, 1).to_pylist()
                    yield Record(f"{self.shown}, row {number + 1}", values, others)
                start += len(batch)
        except (OSError, ArrowException) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> Refused:
        found = f"what pyarrow does not read ({error})"
        return Refused(self.shown, "a file in Parquet", found, "fetch or write the file again")
