"""Copies of a collection that are kept equal to it while others write."""
