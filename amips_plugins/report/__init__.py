"""A training in pictures: one HTML file that needs no network and no script."""
