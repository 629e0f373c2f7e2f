"""Qdrant: embedded local mode, and the server."""
