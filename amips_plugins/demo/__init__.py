"""The demo: questions to the docstrings of the installed Python packages."""
