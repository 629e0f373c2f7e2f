"""The ``amips`` command."""
