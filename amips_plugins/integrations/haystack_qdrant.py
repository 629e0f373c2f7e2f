"""Haystack's store for Qdrant.

>>> from haystack_integrations.document_stores.qdrant import QdrantDocumentStore  # doctest: +SKIP
>>> from amips_plugins.integrations.haystack_qdrant import routed  # doctest: +SKIP
>>> store = routed(QdrantDocumentStore(url=url, index="docs"))  # doctest: +SKIP

A saved pipeline holds the store without its router, since its retrievers load nothing but the
class they know: call ``routed`` for the store of a loaded one.

It needs the extra ``haystack-qdrant``.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["haystack_qdrant"].routed
