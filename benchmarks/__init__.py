"""Benchmarks: what routing saves, and what it costs."""
