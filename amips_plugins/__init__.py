"""Learned query routing for the vector database you already run."""
