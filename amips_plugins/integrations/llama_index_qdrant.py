"""LlamaIndex' store for Qdrant.

>>> from llama_index.vector_stores.qdrant import QdrantVectorStore  # doctest: +SKIP
>>> from amips_plugins.integrations.llama_index_qdrant import routed  # doctest: +SKIP
>>> store = routed(QdrantVectorStore("docs", client=client))  # doctest: +SKIP

It needs the extra ``llama-index-qdrant``.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["llama_index_qdrant"].routed
