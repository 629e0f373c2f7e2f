"""The manifest: what a bundle says of itself, and the checksums of its files."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import BundleMismatch
from amips_plugins.vectors import Metric

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "SIGNATURE",
    "CandidateCost",
    "FileEntry",
    "Manifest",
    "ModelKind",
    "describe_file",
]

FORMAT = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 20  # bytes
SIGNATURE = "manifest.sig"  # beside the manifest, which cannot hold a checksum of it

ModelKind = Literal["native", "linear", "supportnet", "keynet", "tuned"]

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file of the bundle must be."""

    sha256: str
    bytes: _Size


class CandidateCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
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
        Kind of the model in ``model.onnx``; ``tuned`` has none, and sets search parameters.
    preset
        Name of the training recipe.
    parameters
        Number of weights the model multiplies with for each query.
    n_cells, layout
        Number of cells and their identifier; 0 and empty without cells.
    copies
        Further cells of keys that lie in more than one.
    queries
        Where the training queries came from: a log, or a guess from the keys.
    targets
        How the best keys were found that it learned from: ``exact``, by all of the keys. None where
        nothing was learned, and in older bundles.
    default_k, default_recall
        The target when a search names none.
    choice, reason
        What to use at that target (``native``: leave the collection as it is), and why.
    served_cost
        Cost of a search at that target as it is served, with its guarantee and the model's own
        share, in full scans; None where it cannot be promised.
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
    figures: list[CandidateCost]
    tools: dict[str, str]
    files: dict[str, FileEntry]
    served_cost: float | None = None
    copies: _Size = 0
    targets: Literal["exact"] | None = None

    def check_serves(self, collection: CollectionKey, metric: Metric, dim: int) -> None:
        """Refuse a collection that this bundle was not made for."""
        pairs = [
            ("collection", str(self.collection), str(collection)),
            ("metric", str(self.metric), str(metric)),
            ("dimension", str(self.dim), str(dim)),
        ]
        for what, made_for, given in pairs:
            if made_for != given:
                raise BundleMismatch(
                    f"Bundle {self.version} was made for {what} {made_for!r}, not {given!r}; "
                    f"train one on a snapshot of this collection."
                )


def describe_file(data: bytes) -> FileEntry:
    """Return the manifest's entry for a file of this content."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
