"""A bundle: one published model version, verified before a byte of it is used."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import BundleCorrupt, BundleMismatch, BundleNotFound
from amips_plugins.files import read_file
from amips_plugins.vectors import Metric

__all__ = [
    "CALIBRATION",
    "CANNED",
    "CELLS",
    "FORMAT",
    "IDS",
    "KNOWN_CELLS",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "MODEL",
    "REFERENCE",
    "REFERENCE_LIMIT",
    "SIGNATURE",
    "Bundle",
    "Fetch",
    "Figure",
    "FileEntry",
    "Manifest",
    "ModelKind",
    "describe_file",
]

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CELLS = "cells.npz"
CALIBRATION = "calibration.npz"
CANNED = "canned.npz"  # queries, and what the model gave for them
REFERENCE = "reference.npz"  # what the model says of held-out queries; see health.drift
IDS = "ids.jsonl"  # the snapshot's keys, one a line
KNOWN_CELLS = "known_cells.npy"  # (n, 2) int32: cell and sketch of each of them
SIGNATURE = "manifest.sig"  # beside the manifest, which cannot hold a checksum of it

MANIFEST_LIMIT = 1 << 20  # bytes
REFERENCE_LIMIT = 16 << 20
_MOST_FILES = 16
_NO_FILES = ("", ".", "..", MANIFEST, SIGNATURE)
_LIMITS = {  # bytes; the last two grow with the collection, and serving never reads them
    MODEL: 512 << 20,
    CELLS: 512 << 20,
    CALIBRATION: 64 << 20,
    REFERENCE: REFERENCE_LIMIT,
    KNOWN_CELLS: 16 << 30,
    IDS: 64 << 30,
}
_LIMIT = 64 << 20  # of any other file

_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}")  # it becomes a folder of the registry

Fetch = Callable[[str, int], bytes]
ModelKind = Literal["native", "linear", "supportnet", "keynet"]

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file of the bundle must be."""

    sha256: str
    bytes: _Size


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one candidate costs to reach a recall, on held-out queries.

    Attributes
    ----------
    candidate
        ``native`` (spherical k-means cells, centroids), ``linear``, ``supportnet`` or ``keynet``.
    k, recall
        The target: recall@k.
    n_probes
        Mean number of cells searched at the least cost that reaches it.
    scanned, model, total
        Shares of the keys: in the cells searched; the model's multiplications expressed in keys;
        their sum. None where the target is out of reach.
    low, high
        95 % bootstrap interval of ``total``.
    """

    candidate: str
    k: int
    recall: float
    n_probes: float | None
    scanned: float | None
    model: float
    total: float | None
    low: float | None
    high: float | None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a bundle says of itself.

    Attributes
    ----------
    format
        Version of this structure.
    version
        Name of the bundle in its registry.
    created
        UTC time, ISO 8601.
    collection, metric, dim
        What it was made for.
    snapshot, count
        Fingerprint and number of keys of the snapshot it was trained on.
    model
        Kind of the model in ``model.onnx``.
    preset
        Name of the training recipe.
    parameters
        Number of weights the model multiplies with for each query.
    n_cells, layout
        Number of cells and their identifier; 0 and empty for a KeyNet.
    queries
        Where the training queries came from: a log, or a guess from the keys.
    default_k, default_recall
        The target when a search names none.
    choice, reason
        The cheapest candidate at that target (``native``: leave the collection as it is), and why.
    figures
        Costs of every candidate on the test split.
    tools
        Versions of what made it.
    files
        Every file beside the manifest.
    """

    format: int
    version: str
    created: str
    collection: CollectionKey
    metric: Metric
    dim: _Positive
    snapshot: str
    count: _Positive
    model: ModelKind
    preset: str
    parameters: _Size
    n_cells: _Size
    layout: str
    queries: Literal["log", "guess"]
    default_k: _Positive
    default_recall: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
    choice: str
    reason: str
    figures: list[Figure]
    tools: dict[str, str]
    files: dict[str, FileEntry]

    def check_serves(self, database: str, name: str, field: str, metric: Metric, dim: int) -> None:
        """Refuse a collection that this bundle was not made for.

        Raises
        ------
        BundleMismatch
            Name, field, metric or dimension differ; the message names the first that does.
        """
        pairs = [
            ("database", self.collection.database, database),
            ("collection", self.collection.name, name),
            ("field", self.collection.field, field),
            ("metric", str(self.metric), str(metric)),
            ("dimension", str(self.dim), str(dim)),
        ]
        for what, made_for, given in pairs:
            if made_for != given:
                raise BundleMismatch(
                    f"Bundle {self.version} was made for {what} {made_for!r}, not {given!r}; "
                    f"train one on a snapshot of this collection."
                )


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
    """

    manifest: Manifest
    location: str
    fetch: Fetch
    content: bytes = field(repr=False)

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
        """Read and check the manifest; no other file is touched, but by ``check``.

        Parameters
        ----------
        location, fetch
            As the attributes.
        check
            Called with the location, the bytes of the manifest and ``fetch`` before anything is
            decoded, to refuse by raising: see ``signing.signature_check``.

        Raises
        ------
        BundleNotFound
            There is no manifest at the location.
        BundleCorrupt
            The manifest is not one, or of a newer format than this version reads.
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
                raise BundleCorrupt(
                    f"The bundle at {location} has manifest format {version}, this version of "
                    f"amips-plugins reads {FORMAT}; upgrade the package or publish it again."
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
            limit = _LIMITS.get(name, _LIMIT)
            if entry.bytes > limit:
                raise BundleCorrupt(
                    f"{name} of {location} has {entry.bytes} bytes, and {limit} are the limit."
                )
        return cls(manifest, location, fetch, data)

    def read(self, name: str) -> bytes:
        """Read a file and verify it against the manifest.

        Raises
        ------
        BundleCorrupt
            The file is not in the manifest, is missing, or is not what the manifest says.
        """
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


def describe_file(data: bytes) -> FileEntry:
    """Return the manifest's entry for a file of this content."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
