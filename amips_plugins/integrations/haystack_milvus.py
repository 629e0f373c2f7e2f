"""Haystack's store for Milvus.

>>> from milvus_haystack import MilvusDocumentStore  # doctest: +SKIP
>>> from amips_plugins.integrations.haystack_milvus import routed  # doctest: +SKIP
>>> store = routed(MilvusDocumentStore(connection_args={"uri": "docs.db"}))  # doctest: +SKIP

A saved pipeline holds the store without its router: call ``routed`` for the store of a loaded one.

It needs the extra ``haystack-milvus``.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["haystack_milvus"].routed
