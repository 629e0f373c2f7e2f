"""LlamaIndex' store for Milvus.

>>> from llama_index.vector_stores.milvus import MilvusVectorStore  # doctest: +SKIP
>>> from amips_plugins.integrations.llama_index_milvus import routed  # doctest: +SKIP
>>> store = routed(MilvusVectorStore("docs.db", collection_name="docs", dim=384))  # doctest: +SKIP

It needs the extra ``llama-index-milvus``, which takes pymilvus 2.6.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["llama_index_milvus"].routed
