"""Writing a bundle that sets search parameters, and holds no model."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from amips_plugins.bundle.contents import CALIBRATION, EFFORT, KEY_SAMPLE, BundleContents
from amips_plugins.bundle.key_sample import KeySample
from amips_plugins.bundle.manifest import Manifest
from amips_plugins.collection import CollectionInfo, KeyBatch, collection_key
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.tuned import EffortParameter

__all__ = ["write_tuned_bundle"]


def write_tuned_bundle(
    folder: Path,
    info: CollectionInfo,
    count: int,
    sample: KeyBatch,
    parameter: EffortParameter,
    calibration: Calibration,
    *,
    queries: Literal["log", "guess"],
    k: int,
    recall: float,
    reason: str,
    fingerprint: str = "",
) -> Manifest:
    """Write a bundle to a folder; it appears whole or not at all.

    ``sample`` are some keys of the collection, by which it is known again.
    """
    values: dict[str, Any] = {
        CALIBRATION: calibration,
        EFFORT: parameter,
        KEY_SAMPLE: KeySample.of(sample.ids, sample.vectors, info.metric),
    }
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    manifest = BundleContents(values).write(
        building,
        collection=collection_key(info),
        metric=info.metric,
        dim=info.dim,
        snapshot=fingerprint,
        count=count,
        model="tuned",
        preset="tune",
        parameters=0,
        queries=queries,
        default_k=k,
        default_recall=recall,
        choice="tuned",
        reason=reason,
        figures=[],
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("amips-plugins", "numpy")},
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return manifest
