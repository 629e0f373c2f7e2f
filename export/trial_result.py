"""What a quick trial found."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["SearchCost", "Trial"]


class SearchCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one way to search costs on held-out queries.

    Attributes
    ----------
    search
        Its name.
    n_cells
        Number of cells that it chooses from.
    recall
        The recall@k reached.
    total
        Keys scanned and the model's own multiplications, as a share of the keys.
    low, high
        Its 95 % bootstrap interval.
    """

    search: Literal["index", "centroids", "perfect", "linear"]
    n_cells: int
    recall: float
    total: float
    low: float
    high: float


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A quick training on a sample of the keys, measured on queries that it has not seen.

    Attributes
    ----------
    k
        Which recall@k.
    keys, read
        Keys in the sample, and how many of the collection were read to draw it.
    train_queries, test_queries
        Distinct queries that were learned from, and measured on.
    guessed
        Whether the queries were made up from the keys.
    costs
        At recalls .90 and .95: the lists of the collection's own index (where it has some), the
        same number of k-means cells from the nearest centroid outwards, in the best order there
        is, and query-aware cells in the order of a linear router.
    ratio_low, ratio_high
        95 % bootstrap interval of the linear router's cost over that of the native search, at the
        higher recall.
    learned_low, learned_high
        The same of the linear router's cost over that of as many k-means cells.
    query_nearness, key_nearness
        Median cosine between a query and its best key, and between a key and the key nearest to it.
    """

    k: int
    keys: int
    read: int
    train_queries: int
    test_queries: int
    guessed: bool
    costs: tuple[SearchCost, ...]
    ratio_low: float
    ratio_high: float
    learned_low: float
    learned_high: float
    query_nearness: float
    key_nearness: float

    def cost(self, search: str, recall: float) -> float | None:
        """Return the total of a search at a recall; None where it was not measured."""
        for found in self.costs:
            if (found.search, found.recall) == (search, recall):
                return found.total
        return None
