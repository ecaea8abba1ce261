"""Columns of a bundle's items that the model does not see, such as price and brand: to display and to filter by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError, listed

MOST_COLUMNS, LONGEST_TEXT = 64, 4_096
Value = float | str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemMetadata:
    """Columns of N items, each of numbers or of text.

    Attributes:
        columns: [N] values of each column in row order, None = missing.
        numbers: [N] f64 of each column of numbers, NaN = missing.
    """

    columns: Mapping[str, Sequence[Value]]
    numbers: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Value]], count: int) -> ItemMetadata:
        """Check columns of `count` items; an integer becomes a float, and NaN is a missing number.

        Raises:
            DataError: There are too many columns, or one has another length, values of both types or of a third one, a
                number that is not finite, or a text that is too long.
        """
        if len(columns) > MOST_COLUMNS:
            raise DataError(f"metadata has {len(columns)} columns; keep at most {MOST_COLUMNS}")
        kept, numbers = {name: list(values) for name, values in columns.items()}, {}
        for name, values in kept.items():
            if len(values) != count:
                raise DataError(f"metadata: {name!r} has {len(values)} values for {count} items; give one for each")
            kinds = set(map(type, values)) - {type(None)}
            if kinds and kinds <= {int, float}:
                numbers[name] = np.array([np.nan if value is None else value for value in values], np.float64)
                if np.isinf(numbers[name]).any():
                    raise DataError(f"metadata: {name!r} holds a number that is not finite; leave out what is unknown")
                kept[name] = [None if math.isnan(value) else value for value in numbers[name].tolist()]
            elif kinds - {str}:
                some = listed([next(value for value in values if type(value) is kind) for kind in kinds], 3)
                raise DataError(f"metadata: {name!r} holds {some}; a column is all numbers or all text")
            elif long := [text for text in values if text is not None and len(str(text)) > LONGEST_TEXT]:
                raise DataError(
                    f"metadata: {name!r} holds {listed(long, 1)}, a text of {len(str(long[0])):,} characters; "
                    f"store at most {LONGEST_TEXT:,}"
                )
        return cls(columns=kept, numbers=numbers)

    def row(self, row: int) -> dict[str, Value]:
        """The values of one item, None = missing."""
        return {name: values[row] for name, values in self.columns.items()}


def extended(stored: ItemMetadata | None, added: Mapping[str, Mapping[str, Value]], count: int) -> ItemMetadata | None:
    """The columns of `count` items and, after them, of added ones; None if nothing is stored.

    Args:
        stored: The columns of the items before.
        added: Values of each added item, by its place in the input, for messages. A column that it leaves out is
            missing.
        count: Number of items before.

    Raises:
        DataError: An item has an unknown column, or a value that does not fit; see `ItemMetadata.of`.
    """
    columns = {} if stored is None else stored.columns
    for where, values in added.items():
        for name, value in values.items():
            if stored is None or name not in columns:
                raise DataError(f"{where}: unknown metadata {name!r}; the columns of this bundle: {listed(columns)}")
            if value is not None and isinstance(value, str) == (name in stored.numbers):
                kind = "numbers" if name in stored.numbers else "text"
                raise DataError(f"{where}: metadata {name}={listed([value])} does not fit a column of {kind}")
    if stored is None:
        return None
    grown = {name: [*old, *(values.get(name) for values in added.values())] for name, old in columns.items()}
    return ItemMetadata.of(grown, count + len(added))
