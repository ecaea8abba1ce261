"""The items of a bundle: external ids, retired items, and the words of each item.

This module computes the rows that an allow-list, categories and ranges leave; it knows no vectors and no queries.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError, RequestError, listed
from unipinrec.runtime.bundle.metadata import ItemMetadata, Value
from unipinrec.runtime.requests import Range

NO_ROWS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Eligible:
    """Rows that a search may return: the mask `allowed` [N], None = all rows, without the distinct rows `excluded`."""

    allowed: NDArray[np.bool_] | None = None
    excluded: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)

    def count(self, items: int) -> int:
        """How many of N items are eligible."""
        if self.allowed is None:
            return items - len(self.excluded)
        return int(np.count_nonzero(self.allowed) - np.count_nonzero(self.allowed[self.excluded]))

    def rows(self, items: int) -> NDArray[np.int64]:
        """The eligible rows of N items, ascending."""
        mask = np.ones(items, np.bool_) if self.allowed is None else self.allowed.copy()
        mask[self.excluded] = False
        return np.flatnonzero(mask)

    def keep(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The eligible ones of distinct rows, ascending."""
        rows = np.setdiff1d(rows, self.excluded)
        return rows if self.allowed is None else rows[self.allowed[rows]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """N items. A mask over them is [N] bool; None stands for the mask of all items that are not retired.

    Attributes:
        rows: Row of each external id; if an id was retired and added again, the new row.
        num_rows: N, including retired items.
        retired: [R] i64, rows that histories may hold but that no search returns.
        words: Words of each categorical feature; code = index + 1.
        codes: [N, features] i32, 0 = unknown; None if the bundle does not store them.
        metadata: What is known of items and not taught to the model; None if the bundle stores nothing.
    """

    rows: Mapping[str, int]
    num_rows: int
    retired: NDArray[np.int64]
    words: Mapping[str, Sequence[str]]
    codes: NDArray[np.int32] | None
    metadata: ItemMetadata | None = None

    @cached_property
    def live(self) -> NDArray[np.bool_] | None:
        """Mask of the items that are not retired; None if no item is. Do not write to it."""
        return mask_without(self.num_rows, self.retired) if len(self.retired) else None

    @property
    def num_live(self) -> int:
        """How many items are not retired."""
        return self.num_rows - len(self.retired)

    def metadata_of(self, row: int) -> dict[str, Value] | None:
        """Metadata of an item; None if the bundle stores none."""
        return None if self.metadata is None else self.metadata.row(row)

    def known_rows(self, items: Iterable[str]) -> NDArray[np.int64]:
        """Rows of the external ids that the catalogue has, in their order."""
        rows = list(map(self.rows.get, items))
        if None in rows:
            rows = [row for row in rows if row is not None]
        return np.array(rows, np.int64)

    def allowed(
        self,
        allow: Iterable[str] | None,
        categories: Mapping[str, Sequence[str]] | None,
        ranges: Mapping[str, Range] | None = None,
    ) -> NDArray[np.bool_] | None:
        """Mask of the items that are not retired, are in `allow`, and have an accepted word or number of all.

        Raises:
            RequestError: A feature, word or column is unknown, a column is text, a range is empty, or the bundle does
                not store the words of its items.
        """
        masks = [self._with_words(feature, words) for feature, words in (categories or {}).items()]
        masks += [self._in_range(name, bounds) for name, bounds in (ranges or {}).items()]
        if allow is not None:
            masks.append(~mask_without(self.num_rows, self.known_rows(allow)))
        if not masks:
            return self.live
        if self.live is not None:
            masks.append(self.live)
        for mask in masks[1:]:
            masks[0] &= mask
        return masks[0]

    def _with_words(self, feature: str, words: Sequence[str]) -> NDArray[np.bool_]:
        self.require_feature(feature, "categories")
        known = self._known_words[feature]
        if isinstance(words, str):
            raise RequestError(f"categories: {feature}={words!r} must be a list of words; write [{words!r}]")
        missing = [word for word in words if word not in known]
        if missing:
            raise RequestError(f"categories: {feature} has no word {missing[0]!r}; it has {listed(known)}")
        mask = np.zeros(self.num_rows, np.bool_)
        order, starts = self._rows_by_word[feature]
        for code in {known[word] for word in words}:
            mask[order[starts[code] : starts[code + 1]]] = True
        return mask

    def _in_range(self, name: str, bounds: Range | Mapping[str, float]) -> NDArray[np.bool_]:
        try:
            low, high = msgspec.structs.astuple(msgspec.convert(bounds, Range))
        except msgspec.ValidationError as error:
            raise RequestError(f'ranges: {name}: {error}; send {{"min": 5, "max": 20}}, or one of them') from error
        numbers = self.metadata.numbers if self.metadata else {}
        if name not in numbers:
            what = "is text" if self.metadata and name in self.metadata.columns else "is unknown"
            raise RequestError(f"ranges: {name!r} {what}; this bundle has the numbers {', '.join(numbers) or 'none'}")
        low, high = -np.inf if low is None else low, np.inf if high is None else high
        if not low <= high:
            raise RequestError(f"ranges: {name}: min={low} must be at most max={high}, and neither is NaN")
        return (numbers[name] >= low) & (numbers[name] <= high)  # a missing number is NaN, and in no range

    def require_feature(self, feature: str, option: str) -> None:
        """Check the name of a categorical feature.

        Raises:
            RequestError: There is no such feature; the message begins with the option.
        """
        if feature not in self.words:
            features = ", ".join(self.words) or "none"
            raise RequestError(f"{option}: unknown feature {feature!r}; this bundle has the features {features}")

    def codes_of(self, feature: str, option: str) -> NDArray[np.int32]:
        """Codes [N] of a categorical feature, 0 = unknown.

        Raises:
            RequestError: There is no such feature, or the bundle does not store the words of its items.
        """
        self.require_feature(feature, option)
        if self.codes is None:
            raise RequestError(f"{option}: this bundle does not store the words of its items; export it again")
        return self.codes[:, list(self.words).index(feature)]

    @cached_property
    def _known_words(self) -> dict[str, dict[str, int]]:
        return {feature: {word: code for code, word in enumerate(words, 1)} for feature, words in self.words.items()}

    @cached_property
    def _rows_by_word(self) -> dict[str, tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """For each feature, all rows ordered by code, and the place where each code begins."""
        by_word = {}
        for feature, words in self.words.items():
            codes = np.ascontiguousarray(self.codes_of(feature, "categories"))
            order = np.argsort(codes, kind="stable")
            by_word[feature] = order.astype(np.int32), np.searchsorted(codes[order], np.arange(len(words) + 2))
        return by_word


def as_ids(items: Iterable[str | int], name: str) -> list[str]:
    """External item ids as strings; an integer stands for its decimal string. Errors call the list `name`.

    Raises:
        RequestError: It is one string instead of a list, or an element is neither string nor integer.
    """
    if isinstance(items, str | bytes):
        raise RequestError(f"{name}={items!r} must be a list of item ids; write [{items!r}]")
    ids = list(items)
    if not set(map(type, ids)) <= {str, int}:
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, str | int | np.integer):
                raise RequestError(f"{name}: {item!r} is not an item id, which is a string or an integer")
    return list(map(str, ids))


def parse_ids(content: bytes, source: str) -> dict[str, str]:
    """Read external ids, one per line; each key names the line of its id, for messages. Blank lines are left out.

    Spaces around an id are kept, as they may be part of it; see `as_known`.

    Raises:
        DataError: The content is not UTF-8.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: {error}; write one item id per line, in UTF-8") from error
    return {f"{source} line {index}": line.strip("\r") for index, line in enumerate(lines, 1) if line.strip()}


def as_known(item: str, known: Container[str]) -> str:
    """The id unchanged if it is known, else without the spaces around it."""
    return item if item in known else item.strip()


def mask_without(count: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask [count] of all rows except `rows`."""
    mask = np.ones(count, np.bool_)
    mask[rows] = False
    return mask
