"""Items like other items, by the vectors that retrieval and ranking share."""

from __future__ import annotations

import numpy as np

from unipinrec.errors import RequestError, TooFewItemsError
from unipinrec.runtime.bundle.catalogue import Eligible
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.retrieval.retriever import Search
from unipinrec.runtime.server.bodies import SimilarAnswer, SimilarBody, SimilarItem
from unipinrec.runtime.validation import item_row


def similar_items(recommender: Recommender, body: SimilarBody) -> SimilarAnswer:
    """The k items most similar to those of a request, without the latter.

    Raises:
        RequestError: An item or filter is unknown, or k is out of range.
        BackendError: The search failed.
    """
    bundle, catalogue = recommender.bundle, recommender.bundle.catalogue
    rows = np.array([item_row(str(item), bundle.rows, f"items[{i}]") for i, item in enumerate(body.items)], np.int64)
    excluded = np.unique(np.concatenate([rows, catalogue.known_rows(map(str, body.exclude))]))
    allowed = catalogue.allowed(None if body.allow is None else map(str, body.allow), body.categories, body.ranges)
    eligible = Eligible(allowed=allowed, excluded=excluded).count(catalogue.num_rows)
    if body.k < 1:
        raise RequestError(f"k={body.k} must be at least 1")
    if body.k > eligible:
        raise TooFewItemsError(f"k={body.k} is more than the {eligible} items that the filters leave")
    queries = np.ascontiguousarray(recommender.by_item.item_vectors[rows])
    search = Search(queries=queries, k=body.k, excluded=excluded, allowed=allowed, exact=body.exact)
    (result,) = recommender.by_item.retrieve([search])
    items = (
        SimilarItem(
            item=bundle.item_ids[row],
            title=bundle.titles[row],
            similarity=similarity,
            metadata=catalogue.metadata_of(row),
        )
        for row, similarity in zip(result.rows.tolist(), result.similarity.tolist(), strict=True)
    )
    return SimilarAnswer(items=tuple(items), exact=result.exact, bundle=bundle.hash)
