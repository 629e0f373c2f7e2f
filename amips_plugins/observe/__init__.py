"""Watching a router: metrics, traces and a sample of its queries, each an extra of its own."""
