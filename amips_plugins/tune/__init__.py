"""From a collection to its cheapest settings: what ``amips tune`` does."""
