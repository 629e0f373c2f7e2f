"""Whether a router keeps its promise: measured on live queries, and acted on."""
