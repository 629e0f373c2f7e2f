"""A search from the caller to the database and back."""
