"""Cells that share keys, as a bundle holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.arrays import write_npy
from amips_plugins.bundle.contents import FURTHER_CELLS
from amips_plugins.bundle.loading import check_loads, known_cells, load_hook
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.cells import all_cells, further_cells
from amips_plugins.models.hooks import RouteHook
from amips_plugins.vectors import IntArray
from tests.support.bundles import COUNT, N_CELLS, laid_out, open_bundle, vectors, write_bundle


def with_file(content: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[str(FURTHER_CELLS)] = content

    return change


def rows(*pairs: tuple[int, int]) -> bytes:
    return write_npy(np.array(pairs, dtype=np.int32))


def plain_cells(folder: Path) -> IntArray:
    return known_cells(open_bundle(write_bundle(folder)))(list(range(COUNT)), vectors())


def test_further_cells_are_given_beside_the_own_one(tmp_path: Path) -> None:
    own = plain_cells(tmp_path / "plain")
    further = rows((3, (own[3] + 1) % N_CELLS), (3, (own[3] + 2) % N_CELLS), (0, (own[0] + 1) % 6))
    folder = write_bundle(tmp_path / "shared", change=with_file(further), copies=3)
    bundle = open_bundle(folder)
    check_loads(bundle)
    assign = known_cells(bundle)
    members = assign(list(range(COUNT)), vectors())
    assert members.shape == (COUNT, 3)
    assert (members[:, 0] == own).all()
    assert set(members[3].tolist()) == {(own[3] + step) % N_CELLS for step in range(3)}
    assert set(members[0].tolist()) == {own[0], (own[0] + 1) % N_CELLS}
    assert (members[1] == own[1]).all()
    # A key with another vector goes by the rule, to one cell.
    (changed,) = assign([3], vectors(7)[:1])
    assert len(set(changed.tolist())) == 1
    assert laid_out(folder).layout() == bundle.manifest.layout
    hook = load_hook(bundle)
    assert isinstance(hook, RouteHook)


def test_shares_go_by_keys_and_not_by_copies(tmp_path: Path) -> None:
    plain = load_hook(open_bundle(write_bundle(tmp_path / "plain")))
    own = plain_cells(tmp_path / "cells")
    further = rows((0, (own[0] + 1) % N_CELLS))
    folder = write_bundle(tmp_path / "shared", change=with_file(further), copies=1)
    shared = load_hook(open_bundle(folder))
    assert isinstance(plain, RouteHook)
    assert isinstance(shared, RouteHook)
    np.testing.assert_allclose(shared.shares * (COUNT - 1), plain.shares * COUNT, rtol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        rows((COUNT, 0)),
        rows((-1, 0)),
        rows((0, N_CELLS)),
        rows((0, -1)),
        rows((0, 1), (1, 1)),
        write_npy(np.zeros((1, 2), dtype=np.int64)),
        write_npy(np.zeros(2, dtype=np.int32)),
        b"no array",
    ],
)
def test_further_cells_that_cannot_be_are_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bad", change=with_file(content), copies=1)
    with pytest.raises(BundleCorrupt):
        check_loads(open_bundle(folder))


def test_further_cells_that_are_missing_are_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bad", copies=1)
    with pytest.raises(BundleCorrupt, match=r"further_cells\.npy"):
        check_loads(open_bundle(folder))


def test_all_cells_and_further_cells_are_inverse() -> None:
    members = np.array([[2, 2, 2], [1, 0, 2], [0, 0, 0], [2, 1, 2]])
    again = all_cells(members[:, 0].astype(np.int32), further_cells(members))
    assert [set(row) for row in again.tolist()] == [set(row) for row in members.tolist()]
    assert (again[:, 0] == members[:, 0]).all()
