"""Milvus: Milvus Lite and the server."""
