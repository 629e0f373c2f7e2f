"""A bundle: one published model version, verified before a byte of it is used."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from amips_plugins.bundle.contents import limit_of
from amips_plugins.bundle.manifest import (
    FORMAT,
    MANIFEST,
    MANIFEST_LIMIT,
    SIGNATURE,
    Manifest,
    describe_file,
)
from amips_plugins.errors import BundleCorrupt, BundleNotFound
from amips_plugins.files import read_file

__all__ = ["Bundle", "Fetch"]

Fetch = Callable[[str, int], bytes]

_MOST_FILES = 16
_NO_FILES = ("", ".", "..", MANIFEST, SIGNATURE)
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}")  # it becomes a folder of the registry


@dataclass(frozen=True)
class Bundle:
    """A verified manifest and a way to read the files it names.

    Attributes
    ----------
    manifest
        What the bundle says of itself.
    location
        Where it is, for messages.
    fetch
        Reads a file of the bundle: all of it, or at least one byte more than the limit given.
    content
        The bytes that the manifest was read from.
    values
        What ``contents.load`` has read of its files.
    """

    manifest: Manifest
    location: str
    fetch: Fetch
    content: bytes = field(repr=False)
    values: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def in_folder(
        cls, folder: Path, check: Callable[[str, bytes, Fetch], None] | None = None
    ) -> Bundle:
        """Open the bundle in a local folder, as ``open`` does."""
        return cls.open(str(folder), lambda name, limit: read_file(folder / name, limit), check)

    @classmethod
    def open(
        cls,
        location: str,
        fetch: Fetch,
        check: Callable[[str, bytes, Fetch], None] | None = None,
    ) -> Bundle:
        """Read and check the manifest alone, or raise ``BundleNotFound`` or ``BundleCorrupt``.

        ``check`` may refuse its bytes before they are decoded: see ``signing.signature_check``.
        """
        try:
            data = fetch(MANIFEST, MANIFEST_LIMIT)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise BundleNotFound(f"There is no bundle at {location}.") from exc
        if len(data) > MANIFEST_LIMIT:
            raise BundleCorrupt(
                f"The manifest of {location} is larger than {MANIFEST_LIMIT} bytes."
            )
        if check is not None:
            check(location, data, fetch)
        try:
            version = msgspec.json.decode(data, type=_Peek).format
            if version != FORMAT:
                do = "train again" if version < FORMAT else "upgrade the package"
                raise BundleCorrupt(
                    f"The bundle at {location} has manifest format {version}, and this version of "
                    f"amips-plugins reads {FORMAT}; {do}."
                )
            manifest = msgspec.json.decode(data, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise BundleCorrupt(
                f"The manifest of {location} cannot be read ({exc}); publish it again."
            ) from exc
        if not _VERSION.fullmatch(manifest.version):
            raise BundleCorrupt(
                f"The manifest of {location} has the version {manifest.version!r}; a version is "
                f"letters, digits, '-' and '_'."
            )
        if len(manifest.files) > _MOST_FILES:
            raise BundleCorrupt(f"The manifest of {location} names more than {_MOST_FILES} files.")
        for name, entry in manifest.files.items():
            if name != posixpath.basename(name) or name in _NO_FILES:
                raise BundleCorrupt(f"The manifest of {location} names the file {name!r}.")
            limit = limit_of(name)
            if entry.bytes > limit:
                raise BundleCorrupt(
                    f"{name} of {location} has {entry.bytes} bytes, and {limit} are the limit."
                )
        return cls(manifest, location, fetch, data)

    def read(self, name: str) -> bytes:
        """Read a file and verify it against the manifest."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleCorrupt(f"The bundle at {self.location} has no file {name!r}.")
        try:
            data = self.fetch(name, entry.bytes)
        except (FileNotFoundError, IsADirectoryError) as exc:
            raise BundleCorrupt(f"{name} is missing from the bundle at {self.location}.") from exc
        if describe_file(data) != entry:
            raise BundleCorrupt(
                f"{name} in the bundle at {self.location} is not the file that was published "
                f"(its checksum differs); publish it again."
            )
        return data


class _Peek(msgspec.Struct):
    """The one field that every format has."""

    format: int
