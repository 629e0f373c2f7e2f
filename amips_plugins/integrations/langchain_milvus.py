"""LangChain's store for Milvus.

>>> from langchain_milvus import Milvus  # doctest: +SKIP
>>> from amips_plugins.integrations.langchain_milvus import routed  # doctest: +SKIP
>>> store = routed(Milvus(embeddings, connection_args={"uri": "docs.db"}))  # doctest: +SKIP

It needs the extra ``langchain-milvus``.
"""

from __future__ import annotations

from amips_plugins.integrations.stores import STORES

__all__ = ["routed"]

routed = STORES["langchain_milvus"].routed
