"""Items like other items, by the vectors that retrieval and ranking share."""

from __future__ import annotations

import numpy as np

from unipinrec.errors import RequestError, TooFewItemsError
from unipinrec.runtime.bundle.catalogue import Eligible
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.retrieval.retriever import Search
from unipinrec.runtime.server.bodies import SimilarAnswer, SimilarBody, SimilarItem
from unipinrec.runtime.validation import item_row


def similar_items(recommender: Recommender, asked: SimilarBody) -> SimilarAnswer:
    """The k items most similar to those asked for, which are not among them.

    Raises:
        RequestError: An item, a filter or k is not one that can be had.
        BackendError: The search failed.
    """
    bundle, catalogue = recommender.bundle, recommender.bundle.catalogue
    rows = np.array([item_row(str(item), bundle.rows, f"items[{i}]") for i, item in enumerate(asked.items)], np.int64)
    excluded = np.unique(np.concatenate([rows, catalogue.known_rows(asked.exclude)]))
    allowed = catalogue.allowed(asked.allow, asked.categories)
    eligible = Eligible(allowed=allowed, excluded=excluded).count(catalogue.num_rows)
    if asked.k < 1:
        raise RequestError(f"k={asked.k} must be at least 1")
    if asked.k > eligible:
        raise TooFewItemsError(f"k={asked.k} is more than the {eligible} items that are left by the filters")
    queries = np.ascontiguousarray(bundle.item_vectors[rows])
    search = Search(queries=queries, k=asked.k, excluded=excluded, allowed=allowed, exact=asked.exact)
    (found,) = recommender.retriever.retrieve([search])
    items = (
        SimilarItem(item=bundle.item_ids[row], title=bundle.titles[row], similarity=similarity)
        for row, similarity in zip(found.rows.tolist(), found.similarity.tolist(), strict=True)
    )
    return SimilarAnswer(items=tuple(items), exact=found.exact, bundle=bundle.hash)
