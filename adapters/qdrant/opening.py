"""Opening Qdrant: local folders, and the addresses of servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from amips_plugins.errors import CollectionNotFound, DatabaseUnreachable, require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
else:
    QdrantClient = require("qdrant_client", "qdrant").QdrantClient

__all__ = ["is_local", "open_folder", "open_server"]


def is_local(client: QdrantClient) -> bool:
    """Tell whether a client is in local mode."""
    options = client.init_options
    return options.get("location") == ":memory:" or options.get("path") is not None


def open_server(address: str, token: str | None) -> QdrantClient:
    """Make a client of a server; nothing is asked of it yet."""
    # The client's version check warns from a thread of its own: leave it to the operator.
    return QdrantClient(url=address, api_key=token, check_compatibility=False)


def open_folder(folder: str) -> QdrantClient:
    """Open the local database in a folder, unless there is none or another process holds it."""
    # The client would make an empty database out of any folder.
    if not Path(folder, "meta.json").is_file():
        raise CollectionNotFound(
            f"There is no Qdrant database in folder {folder!r}; check the path, or write "
            "http://host:port for a server."
        )
    try:
        return QdrantClient(path=folder)
    except RuntimeError as exc:
        if "already accessed" not in str(exc):
            raise
        raise DatabaseUnreachable(
            f"The Qdrant database in folder {folder!r} is open elsewhere, and only one process can "
            "have it; close it there, or run a Qdrant server."
        ) from exc
