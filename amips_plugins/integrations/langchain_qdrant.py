"""LangChain's store for Qdrant.

>>> from langchain_qdrant import QdrantVectorStore  # doctest: +SKIP
>>> from amips_plugins.integrations.langchain_qdrant import routed  # doctest: +SKIP
>>> store = routed(QdrantVectorStore(client, "docs", embedding=embeddings))  # doctest: +SKIP

It needs the extra ``langchain-qdrant``.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["langchain_qdrant"].routed
