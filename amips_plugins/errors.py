"""Every error this package raises on purpose.

::

    AmipsError
    ├── InvalidInput          an argument cannot be used (also a ValueError)
    ├── MissingExtra          an optional dependency is not installed (also an ImportError)
    ├── CollectionError       the collection cannot serve the request
    │   ├── CollectionNotFound
    │   ├── FieldNotFound
    │   ├── MetricNotSupported
    │   └── DatabaseUnreachable
    ├── SnapshotError         a snapshot is missing, unfinished or damaged
    ├── TrainingError         the data cannot support the training asked for
    └── BundleError           a published model cannot be used
        ├── BundleNotFound
        ├── BundleCorrupt     a checksum, a size or the format is wrong
        ├── BundleMismatch    it was made for another collection, metric or dimension
        └── BundleUnsigned    nobody has signed it whom the registry's reader requires

Each message is one sentence that says what is wrong, followed by what to do about it. Errors that
the database itself raises during a search are never wrapped.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AmipsError",
    "BundleCorrupt",
    "BundleError",
    "BundleMismatch",
    "BundleNotFound",
    "BundleUnsigned",
    "CollectionError",
    "CollectionNotFound",
    "DatabaseUnreachable",
    "FieldNotFound",
    "InvalidInput",
    "MetricNotSupported",
    "MissingExtra",
    "SnapshotError",
    "TrainingError",
    "require",
]


class AmipsError(Exception):
    """Base of every error of this package."""


class InvalidInput(AmipsError, ValueError):
    """An argument cannot be used as given."""


class MissingExtra(AmipsError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class CollectionError(AmipsError):
    """The collection cannot serve the request."""


class CollectionNotFound(CollectionError):
    """The database has no collection of this name."""


class FieldNotFound(CollectionError):
    """The collection has no such vector field, or several and none was named."""


class MetricNotSupported(CollectionError):
    """The collection's metric cannot be served in the mode asked for."""


class DatabaseUnreachable(CollectionError):
    """No database answers at the address given."""


class SnapshotError(AmipsError):
    """A snapshot is missing, unfinished, damaged or of another collection."""


class TrainingError(AmipsError):
    """The data cannot support the training asked for."""


class BundleError(AmipsError):
    """A published model cannot be used."""


class BundleNotFound(BundleError):
    """The registry holds no bundle for the collection, or not this version."""


class BundleCorrupt(BundleError):
    """A file of the bundle is missing or is not what its manifest says."""


class BundleMismatch(BundleError):
    """The bundle was made for another collection, field, metric or dimension."""


class BundleUnsigned(BundleError):
    """The bundle has no signature by a signer that is required, or it cannot be checked."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise ``MissingExtra``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and not f"{module}.".startswith(f"{exc.name}."):
            raise  # the dependency is there but itself broken: do not hide that
        raise MissingExtra(
            f"This needs the package {module.split('.')[0]!r}, which is not installed; "
            f"run: pip install 'amips-plugins[{extra}]'"
        ) from exc
