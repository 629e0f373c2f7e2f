"""One table says what is in a bundle; values go through it unchanged, and are verified once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.bundle import contents as table
from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    GOLDEN_OUTPUTS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    REFERENCE,
    BundleContents,
    BundleFile,
    limit_of,
    load,
)
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import BundleCorrupt
from amips_plugins.routing.serving import serve_bundle
from tests.handmade import about
from tests.support.bundles import COUNT, N_CELLS, make_files, memory, open_bundle, write_bundle


def counting(folder: Path) -> tuple[Bundle, Counter[str]]:
    read: Counter[str] = Counter()

    def fetch(name: str, limit: int) -> bytes:
        read[name] += 1
        return (folder / name).read_bytes()[: limit + 1]

    return Bundle.open("here", fetch), read


def test_values_written_are_the_values_read(tmp_path: Path) -> None:
    first = load(open_bundle(write_bundle(tmp_path / "first")))
    names: tuple[BundleFile[Any], ...] = (
        MODEL,
        GOLDEN_OUTPUTS,
        REFERENCE,
        KEY_SAMPLE,
        CELLS,
        CALIBRATION,
        IDS,
        KNOWN_CELLS,
    )
    again = BundleContents({name: first[name] for name in names})
    manifest = again.write(tmp_path / "second", **about(memory().info, COUNT, N_CELLS, 0.9))
    assert again.files() == make_files()
    assert open_bundle(tmp_path / "second").manifest == manifest
    second = load(open_bundle(tmp_path / "second"))
    np.testing.assert_array_equal(second[KNOWN_CELLS], first[KNOWN_CELLS])
    assert second[CELLS].layout() == first[CELLS].layout() == manifest.layout
    assert manifest.n_cells == N_CELLS


def test_a_router_reads_every_file_once_and_none_that_grows(tmp_path: Path) -> None:
    bundle, read = counting(write_bundle(tmp_path))
    serve_bundle(memory(), bundle, 1)
    serve_bundle(memory(), bundle, 1)
    assert read == {name: 1 for name in (MANIFEST, *make_files()) if name not in (IDS, KNOWN_CELLS)}


def test_what_a_value_is_read_from_is_named_when_it_is_damaged(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, change=lambda files: files.update({KNOWN_CELLS: b"none"}))
    with pytest.raises(BundleCorrupt, match=f"{KNOWN_CELLS} of .* cannot be read"):
        load(open_bundle(folder))[KNOWN_CELLS]


def test_every_file_of_a_bundle_is_in_the_table() -> None:
    assert {str(file) for file in table._FILES} >= set(make_files())
    assert limit_of(IDS) > limit_of(MODEL) > limit_of("anything else")
