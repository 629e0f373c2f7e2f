"""Collection URIs.

::

    milvus:///folder/docs.db?collection=docs        Milvus Lite, a file
    milvus://localhost:19530?collection=docs        Milvus server
    milvus+https://host:443?collection=docs         the same over TLS
    qdrant:///folder?collection=docs                Qdrant local mode, a folder
    qdrant://localhost:6333?collection=docs         Qdrant server
    qdrant+https://host:6333?collection=docs        the same over TLS
    qdrant-edge:///folder?collection=docs           Qdrant Edge, the shard in /folder/docs
    cells:///folder/docs.cells                      a cell file, which knows its collection's name
    cells+s3://bucket/docs.cells                    the same in a store that fsspec reads

``&field=NAME`` names the vector field where there are several, ``&db=NAME`` a database of Milvus
other than the default one, ``&shard_key=NAME`` one custom shard key of Qdrant. Credentials do not
belong into a URI: set ``AMIPS_MILVUS_TOKEN`` or ``AMIPS_QDRANT_API_KEY``.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from amips_plugins.adapters.several.collection import SeveralCollections
from amips_plugins.adapters.several.members import member_name
from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput

__all__ = ["connect", "read_filter"]

_NAMED = re.compile(r"([\w.-]+)=(\w[\w+-]*://.*)")  # a URI with a name in front
_HINT = "write for example milvus:///path/docs.db?collection=docs or qdrant://localhost:6333?collection=docs"

_CELLS = "write for example cells:///folder/docs.cells or cells+s3://bucket/docs.cells"


def connect(uri: str, *others: str, name: str = "all") -> Collection:
    """Open the collection that a URI names (see the module for the forms).

    The collection owns its connection: close it, or use it for the life of the process.

    Parameters
    ----------
    uri
        The collection. With ``others`` it may be written ``NAME=URI``.
    others
        More of them, to search all as one (``LearnedRouter.over``).
    name
        What several are called together.

    Raises
    ------
    InvalidInput
        Not a collection URI.
    MissingExtra
        The database's client is not installed.
    DatabaseUnreachable, CollectionNotFound, FieldNotFound, MetricNotSupported
        There is no such database or collection, or it cannot be used.

    Examples
    --------
    >>> connect("docs.db")
    Traceback (most recent call last):
    ...
    amips_plugins.errors.InvalidInput: 'docs.db' is not a collection URI; write for example ...
    """
    if not others:
        return _connect(uri)
    opened: dict[str, Collection] = {}
    folders: dict[str, Collection] = {}  # of local Qdrant databases: each has one client at a time
    try:
        for given in (uri, *others):
            named = _NAMED.fullmatch(given)
            own = given if named is None else named[2]
            place, _, options = own.partition("?")
            if place in folders:
                found = _beside(folders[place], parse_qs(options))
            else:
                found = _connect(own)
            if place.startswith("qdrant:///"):
                folders[place] = found
            called = member_name(found) if named is None else named[1]
            if called in opened:
                found.close()
                raise InvalidInput(
                    f"Two of the collections are called {called!r}; write NAME=URI, with names of "
                    f"your own."
                )
            opened[called] = found
        return SeveralCollections(opened, name=name)
    except BaseException:
        for found in opened.values():
            found.close()
        raise


def _beside(other: Any, options: dict[str, list[str]]) -> Collection:
    """Open another collection through the client of one that is open."""
    if "collection" not in options:
        raise InvalidInput(f"The collection URI names no collection; {_HINT}.")
    found: Collection = other.beside(options["collection"][0], options.get("field", [None])[0])
    _ = found.info
    return found


def _connect(uri: str) -> Collection:
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InvalidInput(f"The collection URI names no host; {_HINT}.") from None
    try:
        _ = parts.port
    except ValueError:
        raise InvalidInput(f"A port is a number up to 65535; {_HINT}.") from None
    scheme, _, tls = parts.scheme.partition("+")
    if scheme == "cells":
        return _open_cells(uri, tls)
    known = scheme in ("milvus", "qdrant") and tls in ("", "http", "https")
    known = known or parts.scheme == "qdrant-edge"
    if "@" in uri and (parts.netloc or not known):  # in a local path it is just a letter
        raise InvalidInput(
            "Credentials do not belong into a collection URI, where logs would show them; set "
            "AMIPS_MILVUS_TOKEN or AMIPS_QDRANT_API_KEY."
        )
    if not known:
        raise InvalidInput(f"{uri.split('?')[0]!r} is not a collection URI; {_HINT}.")
    if parts.netloc and scheme == "qdrant-edge":
        raise InvalidInput(
            "Qdrant Edge is a folder and has no host; write for example "
            "qdrant-edge:///folder?collection=docs for the shard in /folder/docs."
        )
    if parts.netloc and parts.path not in ("", "/"):
        raise InvalidInput(
            f"The collection URI names both a host and the path {parts.path!r}; a path takes three "
            f"slashes, a host no path: {_HINT}."
        )
    if not parts.netloc and (tls or parts.path in ("", "/")):
        raise InvalidInput(f"The collection URI names no host and no file; {_HINT}.")
    options = parse_qs(parts.query)
    known_options = {"collection", "field"}
    if scheme == "milvus":
        known_options.add("db")
    elif scheme == "qdrant":
        known_options.add("shard_key")
    unknown = sorted(set(options) - known_options)
    if unknown:
        raise InvalidInput(f"Unknown option {unknown[0]!r} in the collection URI; {_HINT}.")
    if "collection" not in options:
        raise InvalidInput(f"The collection URI names no collection; {_HINT}.")
    name = options["collection"][0]
    field = options.get("field", [None])[0]
    address = f"{tls or 'http'}://{parts.netloc}" if parts.netloc else unquote(parts.path)
    if scheme == "milvus":
        from amips_plugins.adapters.milvus.collection import MilvusCollection

        token = os.environ.get("AMIPS_MILVUS_TOKEN")
        database = options.get("db", [""])[0]
        collection: Collection = MilvusCollection.connect(address, name, field, token, database)
    elif scheme == "qdrant-edge":
        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

        collection = QdrantEdgeCollection.connect(address, name, field)
    else:
        from amips_plugins.adapters.qdrant.collection import QdrantCollection

        token = os.environ.get("AMIPS_QDRANT_API_KEY")
        shard_key = options.get("shard_key", [None])[0]
        collection = QdrantCollection.connect(address, name, field, token, shard_key)
    _ = collection.info  # a wrong name or field shows here, not at the first search
    return collection


def _open_cells(uri: str, protocol: str) -> Collection:
    """Open a cell file: on a disk, or where fsspec reads this protocol."""
    from amips_plugins.adapters.cell_file.collection import CellFileCollection

    parts = urlsplit(uri)
    options = parse_qs(parts.query)
    unknown = sorted(set(options) - {"collection", "field"})
    if unknown:
        raise InvalidInput(f"Unknown option {unknown[0]!r} in the URI of a cell file; {_CELLS}.")
    if "@" in parts.netloc:
        raise InvalidInput(
            "Credentials do not belong into a collection URI, where logs would show them; give "
            "them to the store, by its own environment variables or fsspec's configuration."
        )
    path = unquote(parts.path)
    nowhere = path in ("", "/") and not (protocol and parts.netloc)
    if nowhere or (parts.netloc and not protocol):
        raise InvalidInput(f"The URI of a cell file names a file on this machine; {_CELLS}.")
    address = f"{protocol}://{parts.netloc}{path}" if protocol else path
    name, field = (options.get(one, [None])[0] for one in ("collection", "field"))
    return CellFileCollection.connect(address, name, field)


def read_filter(collection: Collection, text: str) -> Any:
    """Make a collection's own filter of what was typed: an expression, or Qdrant's JSON.

    Raises ``InvalidInput`` where it is none of this database, or cannot be typed.
    """
    database = collection.info.database
    if database == "milvus":
        return text
    if database != "qdrant":
        raise InvalidInput(f"A filter of {database} cannot be typed; call evaluate(filter=...).")
    from qdrant_client import models

    try:
        return models.Filter.model_validate_json(text)
    except ValueError:
        raise InvalidInput(
            f"{text!r} is no filter of Qdrant; write JSON, for example "
            '{"must": [{"key": "year", "range": {"gte": 2020}}]}.'
        ) from None
