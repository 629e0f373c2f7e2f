"""A damaged bundle of search parameters is refused by name, and the native search answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.arrays import read_npz, write_npz
from amips_plugins.bundle.contents import CALIBRATION, EFFORT, write_files
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.tuned import EffortParameter
from tests.support.bundles import memory, vectors
from tests.support.tuned import optimistic, write_bundle

Change = Callable[[bytes], bytes]


def rewrite(folder: Path, name: str, change: Change) -> None:
    """Change what a file holds, and sum it anew: only its content is wrong."""
    manifest = Bundle.in_folder(folder).manifest
    files = {one: (folder / one).read_bytes() for one in manifest.files}
    files[name] = change(files[name])
    about = {one: getattr(manifest, one) for one in manifest.__struct_fields__}
    write_files(folder, files, **{k: v for k, v in about.items() if k not in ("files", "version")})


def without_efforts(data: bytes) -> bytes:
    names = ("thresholds", "recall", "guaranteed", "scanned", "confidence", "efforts")
    arrays = read_npz(data, names)
    return write_npz(**{name: arrays[name] for name in names[:-1]})


def other_thresholds(data: bytes) -> bytes:
    names = ("thresholds", "recall", "guaranteed", "scanned", "confidence", "efforts")
    arrays = dict(read_npz(data, names))
    arrays["thresholds"] = np.append(-np.arange(2, dtype=np.float32), -np.inf)
    return write_npz(**arrays)


DAMAGES: dict[str, tuple[str, Change]] = {
    "no parameter": (EFFORT, lambda _: b""),
    "another parameter": (EFFORT, lambda _: b'{"name":"radius"}'),
    "too long": (EFFORT, lambda data: data + b" " * (1 << 17)),
    "no efforts": (CALIBRATION, without_efforts),
    "thresholds of a router": (CALIBRATION, other_thresholds),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_it_is_refused_and_the_native_search_answers(name: str, tmp_path: Path) -> None:
    collection, folder = memory(), tmp_path / "bundle"
    write_bundle(collection, folder, EffortParameter("ef"), optimistic((8, 16)))
    registry = Registry(tmp_path / "registry")
    version = registry.publish(folder)
    rewrite(folder, *DAMAGES[name])
    with pytest.raises(BundleCorrupt):
        registry.publish(folder)
    (home,) = (tmp_path / "registry").rglob(version)
    rewrite(home, *DAMAGES[name])
    content = msgspec.json.decode((home / MANIFEST).read_bytes())
    (home / MANIFEST).write_bytes(msgspec.json.encode(content | {"version": version}))
    router = LearnedRouter(collection, registry=registry, refresh=None)
    hits = router.search(vectors(5, 1)[0], 3)
    assert (hits.trace.mode, hits.trace.fallback, len(hits)) == (
        "native",
        "bundle: BundleCorrupt",
        3,
    )
