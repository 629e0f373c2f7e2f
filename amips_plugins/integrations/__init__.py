"""Vector stores of the common frameworks, searched through a router: one module for each.

====================== ==========================================================
module                 what its ``routed(store)`` takes
====================== ==========================================================
``langchain_qdrant``   ``langchain_qdrant.QdrantVectorStore``
``langchain_milvus``   ``langchain_milvus.Milvus``
``llama_index_qdrant`` ``llama_index.vector_stores.qdrant.QdrantVectorStore``
``llama_index_milvus`` ``llama_index.vector_stores.milvus.MilvusVectorStore``
``haystack_qdrant``    ``haystack_integrations...qdrant.QdrantDocumentStore``
``haystack_milvus``    ``milvus_haystack.MilvusDocumentStore``
====================== ==========================================================

Over several stores of a framework ``langchain``, ``llama_index`` and ``haystack`` have a
``RoutedRetriever``.

The store stays what it is; only its client is replaced (see ``amips_plugins.route``).
"""
