"""What export reads off a module and its catalogue, so that the caller need not say it."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unipinrec.errors import ExportError, listed, reason
from unipinrec.runtime.bundle.bundle import wrong_rows
from unipinrec.runtime.bundle.manifest import Caching, OrderSpec, RankerInput, Similarity

HALF = (torch.bfloat16, torch.float16)
# Fields of a `ModelSpec` before they are inferred.
SIZES = dict.fromkeys(("num_layers", "num_kv_heads", "head_dim", "hidden_size", "item_dim"), 1)
UNKNOWN: dict[str, Any] = {**SIZES, "kv_prefix_slots": 0, "outcome_conditioned": False}
log = logging.getLogger(__name__)

Pairs = list[tuple[Tensor, Tensor]]
Layout = tuple[int, int, int, int]  # layers, heads, prefix slots, head_dim


class SimpleOptions(TypedDict, total=False):
    """Options of `ExportSource.simple`.

    Attributes:
        positive_actions: Actions that the value weighs; all of `actions` unless given.
        surfaces: Names of surfaces; only "unknown" unless given.
        titles, dense, categories, item_dense, item_categories: As in `ExportSource`; none unless given.
        metrics, order, metadata: As in `ExportSource`; none unless given.
        config: As in `ExportSource`; the name of the module's class unless given.
        similarity, item_bias: As in `ModelSpec`. Unless given, "cosine" if a sample of item vectors and queries is of
            unit length, else "dot", with a warning; and no bias.
        cache: As in `ModelSpec`; "prefix" unless given. A module without `extend` needs "none".
    """

    positive_actions: Iterable[str]
    surfaces: Iterable[str]
    titles: Iterable[str | None]
    dense: dict[str, int]
    categories: Mapping[str, Iterable[str]]
    item_dense: NDArray[Any]
    item_categories: NDArray[Any]
    metrics: dict[str, Any]
    order: OrderSpec
    metadata: Mapping[str, Sequence[float | str | None]]
    config: dict[str, Any]
    similarity: Similarity
    item_bias: bool
    cache: Caching


def in_float32(module: nn.Module) -> nn.Module:
    """The module itself; if it has bf16 or fp16 weights, a copy with these in f32. The module itself stays as it is.

    Beside it, the copy takes the memory of its weights in f32. Logs a warning.
    """

    def halves(one: nn.Module) -> Iterator[Tensor]:
        return (tensor for tensor in itertools.chain(one.parameters(), one.buffers()) if tensor.dtype in HALF)

    name, dtypes = type(module).__name__, {str(tensor.dtype) for tensor in halves(module)}
    if not dtypes:
        return module
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ExportError(
            f"{name} has weights in {listed(sorted(dtypes))} and cannot be copied to float32: {reason(error)}; pass "
            "module.float()"
        ) from error
    for tensor in halves(copied):
        tensor.data = tensor.data.float()
    log.warning("%s has weights in %s; a copy in float32 is exported", name, listed(sorted(dtypes)))
    return copied


def item_names(ids: Iterable[Any]) -> list[str]:
    """Item ids as text; an integer becomes its digits.

    Raises:
        ExportError: An id is neither text nor an integer, two ids are the same text, or there are none.
    """
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ExportError(f"item_ids is {listed([ids])}; pass one id per item, in the order of the rows")
    given = list(ids)
    for row, one in enumerate(given):
        if isinstance(one, bool) or not isinstance(one, str | int | np.integer):
            raise ExportError(f"item_ids: row {row} is {listed([one])}, a {type(one).__name__}; pass text or integers")
    names = [str(one) for one in given]
    if len(set(names)) != len(names):
        counted, again = set[str](), dict[str, None]()
        for name in names:
            (again.setdefault(name) if name in counted else counted.add(name))
        raise ExportError(f"item_ids must be distinct as text; {listed(again)} occur more than once")
    if not names:
        raise ExportError("item_ids is empty; pass one id per item")
    return names


def texts(names: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple; a text is a single name."""
    return (names,) if isinstance(names, str) else tuple(names)


def plain(what: str, values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Values as JSON can hold them; a numpy scalar becomes a number.

    Raises:
        ExportError: A value is something else.
    """

    def number(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        raise ExportError(f"{what} holds {listed([value])}, a {type(value).__name__}; pass text, numbers, lists, dicts")

    builtins: dict[str, Any] | None = msgspec.to_builtins(values, enc_hook=number)
    return builtins


def called(module: nn.Module, method: str, *arguments: object) -> Any:
    """What a method of a module returns.

    Raises:
        ExportError: It raised; names the method, the error and its place.
    """
    try:
        return getattr(module, method)(*arguments)
    except Exception as error:
        raise ExportError(f"{type(module).__name__}.{method} failed on a tiny batch: {reason(error)}") from error


def of_shape(value: Any, what: str, *shape: int | str) -> Tensor:
    """The value, if it is an f32 tensor of this shape; a name in the shape fits any size.

    Raises:
        ExportError: It is not.
    """
    is_tensor = isinstance(value, Tensor)
    fits = is_tensor and len(value.shape) == len(shape) and value.dtype == torch.float32
    if fits and all(isinstance(size, str) or size == real for size, real in zip(shape, value.shape, strict=True)):
        return value  # type: ignore[no-any-return]
    real = f"{value.dtype} {list(value.shape)}" if is_tensor else f"a {type(value).__name__}"
    raise ExportError(f"{what}: returned {real}, expected torch.float32 [{', '.join(map(str, shape))}]")


def encoded(result: Any, batch: int, events: int) -> tuple[Pairs, Tensor, Layout]:
    """The keys and values and the hidden states that `encode` returned, and the layout of the former.

    Raises:
        ExportError: They are not of the documented form.
    """
    try:
        key_values, last = result
        pairs = [(key, value) for key, value in key_values]
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"encode: returned a {type(result).__name__}; return (key_values, last_hidden_state), with a pair (key, "
            "value) per layer"
        ) from error
    hidden = of_shape(last, "encode: last_hidden_state", batch, "d")
    tensors = [
        of_shape(tensor, "encode: key or value", batch, "kv heads", "slots", "head_dim")
        for tensor in itertools.chain.from_iterable(pairs)
    ]
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ExportError(
            f"encode: keys and values have the shapes {listed(sorted(shapes))} per row; pad them to a single one"
        )
    heads, slots, head_dim = next(iter(shapes), (0, events, 0))
    return pairs, hidden, (len(pairs), heads, slots - events, head_dim)


def retrieved(module: nn.Module, hidden: Tensor, outcomes: Tensor) -> tuple[bool, Any]:
    """Whether `retrieve` needs outcomes, and its queries."""
    try:
        return False, called(module, "retrieve", hidden, None)
    except ExportError as without:
        try:
            return True, called(module, "retrieve", hidden, outcomes)
        except ExportError as error:
            raise ExportError(f"{without}; with outcomes, {error}") from without


def ranker_input(module: nn.Module) -> RankerInput | None:
    """What the method `rank` takes of a history, by its signature; None if there is no such method."""
    rank = getattr(module, "rank", None)
    if not callable(rank):
        return None
    parameters = inspect.signature(rank).parameters
    needed = [one for one in parameters.values() if one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD]
    return "past+last_hidden_state" if "last_hidden_state" in parameters or len(needed) > 2 else "past"


def similarity_of(vectors: Tensor, queries: Tensor) -> Similarity:
    """ "cosine" if item vectors [N, E] and queries [Q, E] are of unit length, else "dot", with a warning.

    Raises:
        ExportError: They are not finite.
    """
    for name, values in (("embed_items", vectors), ("retrieve", queries)):
        if not torch.isfinite(values).all():
            raise ExportError(f"{name}: returned values that are not finite; train again")
    items, others = (len(wrong_rows(values.numpy(), "cosine")) for values in (vectors, queries))
    if not items and not others:
        return "cosine"
    log.warning(
        'similarity="dot" is inferred: of unit length are not %s of %s item vectors and %s of %s queries; pass '
        "similarity to choose, and item_bias=True if the last number of an item vector is a bias",
        *(items, len(vectors), others, len(queries)),
    )
    return "dot"
