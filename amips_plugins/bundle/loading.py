"""What a bundle has to stand before it is published."""

from __future__ import annotations

from amips_plugins.bundle.manifest import Bundle
from amips_plugins.layout import known_cells
from amips_plugins.models.hooks import load_hook

__all__ = ["check_loads"]


def check_loads(bundle: Bundle) -> None:
    """Load all of a bundle, as the services and ``amips layout`` will.

    Parameters
    ----------
    bundle
        A bundle for any collection.

    Raises
    ------
    BundleCorrupt
        They would refuse it.
    """
    load_hook(bundle)
    if bundle.manifest.layout:
        known_cells(bundle)
