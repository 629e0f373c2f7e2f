from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amips_plugins.cli.queries import load_queries
from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import FloatArray
from tests.support.training_data import gaussian


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_load_queries_reads_any_float(dtype: type[np.floating], tmp_path: Path) -> None:
    queries = gaussian(7, 4).astype(dtype)
    np.save(tmp_path / "q.npy", queries)
    loaded: FloatArray = load_queries(tmp_path / "q.npy", 4)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, queries.astype(np.float32))


def test_load_queries_refuses_what_is_no_matrix_of_queries(tmp_path: Path) -> None:
    path = tmp_path / "q.npy"
    with pytest.raises(InvalidInput, match=r"no file .*q\.npy.*pass a \.npy file"):
        load_queries(path, 4)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_queries(tmp_path, 4)
    for content in (b"", b"id,vector\n1,0.5\n"):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"not a \.npy array") as refused:
            load_queries(path, 4)
        assert "pickle" not in str(refused.value)  # what numpy would advise
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match=r"not a \.npy array"):
        load_queries(path, 4)
    nan = gaussian(5, 4)
    nan[3, 1] = np.nan
    for array, hint in (
        (gaussian(5, 3), "dimension 4"),
        (gaussian(1, 4)[0], r"shape \(4,\)"),
        (gaussian(4, 4).reshape(2, 2, 4), r"shape \(2, 2, 4\)"),
        (gaussian(0, 4), "empty"),
        (nan, "Query 3 holds a NaN"),
        (np.array([["a", "b", "c", "d"]]), "must be numbers"),
    ):
        np.save(path, array)
        with pytest.raises(InvalidInput, match=hint):
            load_queries(path, 4)
    np.save(path, gaussian(50, 4))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InvalidInput, match=r"not a \.npy array"):
        load_queries(path, 4)
    np.savez(tmp_path / "q.npz", gaussian(5, 4))
    with pytest.raises(InvalidInput, match="archive; save the one array"):
        load_queries(tmp_path / "q.npz", 4)
