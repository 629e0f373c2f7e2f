"""Vector stores of the common frameworks, searched through a router: one module for each.

===================== ============================================ =====================
module                what it routes                               how
===================== ============================================ =====================
``langchain_qdrant``  ``langchain_qdrant.QdrantVectorStore``       ``routed(store)``
``langchain_milvus``  ``langchain_milvus.Milvus``                  ``routed(store)``
``llama_index_qdrant`` ``QdrantVectorStore`` of LlamaIndex         ``routed(store)``
``llama_index_milvus`` ``MilvusVectorStore`` of LlamaIndex         ``routed(store)``
``haystack_qdrant``   ``QdrantDocumentStore`` of Haystack          a subclass, two arguments
``haystack_milvus``   ``MilvusDocumentStore`` of Haystack          a subclass, two arguments
===================== ============================================ =====================

The store stays what it is; only its client is replaced (see ``amips_plugins.route``).
"""
