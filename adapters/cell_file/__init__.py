"""Cell files: keys by cell in one flat file, read a whole cell at a time."""
