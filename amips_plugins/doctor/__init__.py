"""Whether routing would pay for a collection, found out without changing it."""
