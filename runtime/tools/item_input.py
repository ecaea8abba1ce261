"""Items that arrive after export: the input format, its checks, and their vectors from the item embedder graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError, DataError, decoding
from unipinrec.runtime.bundle.bundle import REQUIRED, Bundle, wrong_rows
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.bundle.metadata import Value
from unipinrec.runtime.graphs.ort_cpu import OrtBackend

EMBED_CHUNK = 65_536
ITEM_FORMAT = (
    'an item is {"item": "id", "title": "name", "dense": {"feature": [0.5]}, "categories": {"feature": "word"}, '
    '"metadata": {"column": 5}}; title may be left out, and a category or column too: it is then unknown'
)


class NewItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An item to add.

    Attributes:
        item: External id; an integer stands for its decimal string.
        title: Title for users; None = its category words.
        dense: Values of every dense feature that the model declares.
        categories: Word of each categorical feature. A missing word, or one that the model does not know, is unknown.
        metadata: Numbers and text by column of the bundle's metadata; a column that is left out is missing.
    """

    item: str | int
    title: str | None = None
    dense: dict[str, tuple[float, ...]] = {}
    categories: dict[str, str] = {}
    metadata: dict[str, Value] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemRows:
    """A new items in row order: ids, titles, dense [A, F] f32, codes [A, features] i32; counts of unknown words.

    `metadata` is by the place of an item in the input.
    """

    ids: tuple[str, ...]
    titles: tuple[str | None, ...]
    dense: NDArray[np.float32]
    codes: NDArray[np.int32]
    unknown_words: dict[str, int]
    metadata: dict[str, dict[str, Value]]


def parse_items(content: bytes, source: str) -> dict[str, NewItem]:
    """Read a JSON list of items or one item per line; the keys name the place of each, for messages.

    Raises:
        DataError: The content is not JSON, or no list of items; an unknown key is an error.
    """
    listed = content.lstrip().startswith(b"[")
    with decoding(DataError, source, ITEM_FORMAT):
        parts = msgspec.json.decode(content, type=list[msgspec.Raw]) if listed else content.splitlines()
    items = {}
    for index, part in enumerate(parts):
        where = f"{source}[{index}]" if listed else f"{source} line {index + 1}"
        with decoding(DataError, where, ITEM_FORMAT):
            if listed or bytes(part).strip():
                items[where] = msgspec.json.decode(part, type=NewItem)
    return items


def check_items(items: Mapping[str, NewItem], manifest: Manifest, taken: Container[str]) -> ItemRows:
    """Check items against the features of the model; `taken` holds the ids in use.

    Raises:
        BundleError: The model declares no item features, and so has no vectors for new items.
        DataError: An id is empty, has a line break, occurs twice or is taken; a feature is unknown, missing, of the
            wrong width or not finite.
    """
    if items and "item_embedder" not in manifest.graphs:
        raise BundleError(
            "this model knows items by their id alone: it has no vector for a new one; "
            "train with the new items and export again, or declare item features (dense_*, category_*) when training"
        )
    first: dict[str, str] = {}
    unknown: Counter[str] = Counter()
    dense = np.zeros((len(items), sum(manifest.dense.values())), np.float32)
    codes = np.zeros((len(items), len(manifest.categories)), np.int32)
    known = [{word: code for code, word in enumerate(words, 1)} for words in manifest.categories.values()]
    for row, (where, item) in enumerate(items.items()):
        identity = str(item.item)
        if not identity.strip() or "\n" in identity or "\r" in identity:
            raise DataError(
                f"{where}: item {identity!r}: an id is not empty and has no line break, as in a list of ids"
            )
        if identity in first:
            raise DataError(f"{where}: item {identity!r} occurs twice, first at {first[identity]}; give each item once")
        if identity in taken:
            raise DataError(
                f"{where}: item {identity!r} is already in the catalogue; retire it at the same time to replace it"
            )
        first[identity] = where
        dense[row] = _dense(item, manifest.dense, where)
        _check_names(item.categories, manifest.categories, "categorical", where)
        for column, feature in enumerate(manifest.categories):
            if feature in item.categories:
                codes[row, column] = known[column].get(item.categories[feature], 0)
                unknown[feature] += not codes[row, column]
    return ItemRows(
        ids=tuple(first),
        titles=tuple(_title(*parts, manifest) for parts in zip(items.values(), codes.tolist(), strict=True)),
        dense=dense,
        codes=codes,
        unknown_words={feature: count for feature, count in unknown.items() if count},
        metadata={where: item.metadata for where, item in items.items()},
    )


def embed_items(rows: ItemRows, bundle: Bundle) -> NDArray[np.float32]:
    """Vectors [A, E] for new items.

    Raises:
        BackendError: The graph does not run.
        DataError: An item has no such vector, because its values are too large for the model.
    """
    if not rows.ids:
        return np.zeros((0, bundle.manifest.model.item_dim), np.float32)
    graphs = {"item_embedder": bundle.files.graph(bundle.manifest.graphs["item_embedder"].file)}
    inputs: dict[str, NDArray[Any]] = {}
    if bundle.manifest.dense:
        inputs["dense"] = rows.dense
    if bundle.manifest.categories:
        inputs["categories"] = rows.codes.astype(np.int64)
    parts = []
    with closing(OrtBackend(graphs)) as backend:
        for start in range(0, len(rows.ids), EMBED_CHUNK):
            chunk = {name: values[start : start + EMBED_CHUNK] for name, values in inputs.items()}
            parts.append(backend.run("item_embedder", chunk)["item_vectors"].numpy())
    vectors = np.concatenate(parts)
    similarity = bundle.manifest.model.similarity
    wrong = wrong_rows(vectors, similarity)
    if len(wrong):
        raise DataError(
            f"item {rows.ids[wrong[0]]!r}: its vector is not {REQUIRED[similarity]}; the largest of its dense values "
            f"is {np.abs(rows.dense[wrong[0]]).max(initial=0.0):g}: give values such as the model was trained on"
        )
    return vectors


def _dense(item: NewItem, declared: Mapping[str, int], where: str) -> list[float]:
    """The values of all dense features side by side, in declared order."""
    _check_names(item.dense, declared, "dense", where)
    values: list[float] = []
    for feature, width in declared.items():
        numbers = item.dense.get(feature)
        if numbers is None or len(numbers) != width:
            count = "is missing" if numbers is None else f"has {len(numbers)} values"
            raise DataError(f"{where}: dense feature {feature!r} {count}; the model needs {width}")
        values += numbers
    largest = float(np.finfo(np.float32).max)
    if not all(-largest <= value <= largest for value in values):
        raise DataError(f"{where}: a dense value of {list(item.dense.values())} is not a finite 32-bit number")
    return values


def _check_names(features: Mapping[str, object], declared: Mapping[str, object], kind: str, where: str) -> None:
    for feature in features:
        if feature not in declared:
            listed = ", ".join(declared) or "none"
            raise DataError(f"{where}: unknown {kind} feature {feature!r}; the model's {kind} features: {listed}")


def _title(item: NewItem, codes: list[int], manifest: Manifest) -> str | None:
    words = zip(manifest.categories.items(), codes, strict=True)
    return item.title or ", ".join(f"{name} {known[code - 1]}" for (name, known), code in words if code) or None
