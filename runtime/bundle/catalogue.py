"""The items of a bundle as a request names them: external ids, what is retired, and the words of each item.

Answers which rows an allow-list and categories leave; refuses to know vectors and queries.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError, RequestError, listed

NO_ROWS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """N items; a mask over them is [N] bool, and None stands for the mask of all items that are not retired.

    Attributes:
        rows: Row of each external id; of an id that was retired and added again, the new one.
        num_rows: N, retired items included.
        retired: [R] i64, rows that histories may hold but that are never found again.
        words: Words of each categorical feature; code = index + 1.
        codes: [N, features] i32, 0 = unknown; None where the bundle does not carry them.
    """

    rows: Mapping[str, int]
    num_rows: int
    retired: NDArray[np.int64]
    words: Mapping[str, Sequence[str]]
    codes: NDArray[np.int32] | None

    @cached_property
    def live(self) -> NDArray[np.bool_] | None:
        """Mask of the items that are not retired; None where none is. Not to be written to."""
        return mask_without(self.num_rows, self.retired) if len(self.retired) else None

    @property
    def num_live(self) -> int:
        """How many items are not retired."""
        return self.num_rows - len(self.retired)

    def known_rows(self, items: Iterable[str]) -> NDArray[np.int64]:
        """Rows of those external ids that there are, in their order."""
        found = list(map(self.rows.get, items))
        if None in found:
            return np.array([row for row in found if row is not None], np.int64)
        return np.array(found, np.int64)

    def allowed(
        self, allow: Iterable[str] | None, categories: Mapping[str, Sequence[str]] | None
    ) -> NDArray[np.bool_] | None:
        """Mask of the items that are not retired, are on the list, and have one of the words of every given feature.

        Raises:
            RequestError: A feature or word is unknown, or the bundle does not carry the words of its items.
        """
        masks = [] if allow is None else [self._mask(self.known_rows(allow))]
        masks += [self._with_words(feature, words) for feature, words in (categories or {}).items()]
        if not masks:
            return self.live
        if self.live is not None:
            masks.append(self.live)
        for mask in masks[1:]:
            masks[0] &= mask
        return masks[0]

    def eligible(self, allowed: NDArray[np.bool_] | None, excluded: NDArray[np.int64]) -> int:
        """How many items a mask leaves without some distinct rows."""
        if allowed is None:
            return self.num_rows - len(excluded)
        return int(np.count_nonzero(allowed) - np.count_nonzero(allowed[excluded]))

    def _mask(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        mask = np.zeros(self.num_rows, np.bool_)
        mask[rows] = True
        return mask

    def _with_words(self, feature: str, words: Sequence[str]) -> NDArray[np.bool_]:
        known = self._known_words.get(feature)
        if known is None:
            features = ", ".join(self.words) or "none"
            raise RequestError(
                f"categories: unknown feature {feature!r}; this bundle's categorical features: {features}"
            )
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

    @cached_property
    def _known_words(self) -> dict[str, dict[str, int]]:
        return {feature: {word: code for code, word in enumerate(words, 1)} for feature, words in self.words.items()}

    @cached_property
    def _rows_by_word(self) -> dict[str, tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Of each feature, all rows ordered by code, and where each code begins."""
        if self.codes is None:
            raise RequestError(
                "categories: this bundle does not carry the words of its items, it was written before bundles did; "
                "export it again"
            )
        made = {}
        for index, (feature, words) in enumerate(self.words.items()):
            codes = np.ascontiguousarray(self.codes[:, index])
            order = np.argsort(codes, kind="stable")
            made[feature] = order.astype(np.int32), np.searchsorted(codes[order], np.arange(len(words) + 2))
        return made


def as_ids(given: Iterable[str | int], name: str) -> list[str]:
    """External item ids as texts; an integer stands for its decimal string. `name` says in errors what they are.

    Raises:
        RequestError: Given is one text, not a list of them, or an element is neither text nor integer.
    """
    if isinstance(given, str | bytes):
        raise RequestError(f"{name}={given!r} must be a list of item ids; write [{given!r}]")
    ids = list(given)
    if set(map(type, ids)) <= {str, int}:
        return list(map(str, ids))
    wrong = [item for item in ids if isinstance(item, bool) or not isinstance(item, str | int | np.integer)]
    if wrong:
        raise RequestError(f"{name}: {wrong[0]!r} is not an item id, which is a text or an integer")
    return list(map(str, ids))


def parse_ids(content: bytes, source: str) -> dict[str, str]:
    """Read external ids, one per line; the keys say where each was, for messages. Blank lines are left out.

    Spaces around an id are kept, as they may be part of it; see `as_known`.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: {error}; write one item id per line, in UTF-8") from error
    return {f"{source} line {index}": line.strip("\r") for index, line in enumerate(lines, 1) if line.strip()}


def as_known(written: str, known: Container[str]) -> str:
    """An id from a list as it was written, or without the spaces around it if it is not known with them."""
    return written if written in known else written.strip()


def mask_without(count: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask [count] of all rows but these."""
    mask = np.ones(count, np.bool_)
    mask[rows] = False
    return mask
