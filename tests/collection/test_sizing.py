"""The advice for a memory is what was cheapest when memory was capped to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.collection.sizing import (
    Kept,
    bytes_of,
    bytes_of_build,
    size_up,
)
from amips_plugins.errors import InvalidInput

KEYS, DIM = 300_000, 384
FLOATS = KEYS * DIM * 4


@pytest.mark.parametrize(
    ("share", "keep"),
    [
        (1.2, "vectors"),
        (0.50, "codes and graph"),  # 4-bit graph 1.3 ms, scan of codes 2.7 ms
        (0.25, "codes and graph"),  # 4-bit graph .53 ms of CPU, routed codes 1.1
        (0.13, "codes in cells"),  # routed codes 1.7 ms, 2-bit graph 7.1
        (0.10, "codes in cells"),  # routed codes 2.2 ms, inline storage 11
        (0.065, "cell file"),  # one read a cell 2.4 ms, inline storage 11, routed 24
        (0.05, "cell file"),  # one read a cell 3.9 ms, inline storage 12.9, routed 31
    ],
)
def test_the_measured_rows(share: float, keep: str) -> None:
    found = size_up(KEYS, DIM, int(share * FLOATS))
    assert found.keep == keep
    assert found.text.count(". ") == 0


def test_few_codes_are_scanned() -> None:
    assert size_up(80_000, DIM, int(0.1 * 80_000 * DIM * 4)).keep == "codes, scanned"


@given(keys=st.integers(1, 10**9), dim=st.integers(2, 4096), memory=st.integers(10**6, 10**13))
def test_what_is_advised_fits_and_more_memory_never_keeps_less(
    keys: int, dim: int, memory: int
) -> None:
    found, more = size_up(keys, dim, memory), size_up(keys, dim, 2 * memory)
    assert found.needed <= memory or found.keep == "cell file"
    assert more.bits >= found.bits


@pytest.mark.parametrize(
    ("index", "keys", "megabytes"),
    [
        ("IVF_FLAT", 50_000, 81),
        ("HNSW", 50_000, 83),
        ("IVF_FLAT", 100_000, 165),
        ("HNSW", 100_000, 191),
    ],
)
def test_a_milvus_index_takes_what_a_server_took(index: str, keys: int, megabytes: int) -> None:
    """The column MB of docs/performance.md, dimension 384."""
    assert bytes_of(keys, DIM, Kept(index)) == pytest.approx(megabytes * 1e6, rel=0.15)


@pytest.mark.parametrize(
    ("index", "share", "coded_graphs", "keep", "bits", "words"),
    [
        ("HNSW", 1.3, False, "vectors", 32, "it fits as it is"),
        ("IVF_FLAT", 1.1, False, "vectors", 32, "it fits as it is"),
        ("SCANN", 1.1, False, "codes, scanned", 8, "IVF_SQ8 148 MB: build that, with"),
        ("HNSW", 0.5, True, "codes and graph", 8, "HNSW_SQ 190 MB: build that, with the vectors"),
        ("HNSW", 0.5, False, "codes, scanned", 8, "IVF_SQ8 148 MB: build that, with"),
        ("HNSW", 0.35, True, "codes, scanned", 8, "IVF_SQ8 148 MB: build that, with"),
        ("IVF_SQ8", 0.35, True, "codes, scanned", 8, "it fits as it is"),
        ("HNSW", 0.2, True, "codes, scanned", 2, "IVF_PQ 61 MB: build that"),
        ("IVF_SQ8", 0.2, True, "codes, scanned", 2, "IVF_PQ 61 MB: build that"),
        ("IVF_PQ", 0.1, True, "cell file", 2, "amips cell-file"),
    ],
)
def test_what_of_milvus_fits(
    index: str, share: float, coded_graphs: bool, keep: str, bits: int, words: str
) -> None:
    kept = Kept(index, coded_graphs=coded_graphs)
    found = size_up(KEYS, DIM, int(share * FLOATS), "milvus", kept)
    assert (found.keep, found.bits) == (keep, bits)
    assert words in found.text
    assert found.text.count(". ") == 0


def test_mapped_files_and_long_ids_are_told_and_counted() -> None:
    mapped = size_up(KEYS, DIM, int(0.5 * FLOATS), "milvus", Kept("HNSW", mapped=True))
    assert "mapped (mmap) it reads the rest from the disk" in mapped.text
    short, long = (bytes_of(KEYS, DIM, Kept("HNSW", id_bytes=size)) for size in (8, 64))
    assert long - short == 56 * KEYS


@given(
    keys=st.integers(1, 10**9),
    dim=st.integers(2, 4096),
    memory=st.integers(10**6, 10**13),
    index=st.sampled_from(["FLAT", "HNSW", "HNSW_SQ", "IVF_SQ8", "IVF_PQ", "SCANN", "DISKANN"]),
    coded_graphs=st.booleans(),
)
def test_what_is_advised_of_milvus_fits(
    keys: int, dim: int, memory: int, index: str, coded_graphs: bool
) -> None:
    found = size_up(keys, dim, memory, "milvus", Kept(index, coded_graphs=coded_graphs))
    assert found.needed <= memory or found.keep == "cell file"


@pytest.mark.parametrize("database", ["milvus", "several", "cell-file"])
def test_of_others_nothing_is_known(database: str) -> None:
    with pytest.raises(InvalidInput, match="--memory"):
        size_up(KEYS, DIM, FLOATS, database)


def bytes_of_one(
    keys: int, name: str, bytes_per_key: float, kept: Kept | None, *, on_disk: bool = True
) -> int:
    return bytes_of_build(keys, 8, name, bytes_per_key, kept, vectors_on_disk=on_disk)


def test_builds_that_tune_tries_take_their_codes_and_their_graph() -> None:
    assert bytes_of_one(100, "int8", 8.0, None) == int(100 * (8 + 140.8 + 40))
    assert bytes_of_one(100, "IVF_SQ8", 8.0, Kept("HNSW")) == 100 * (8 + 100 + 8)
    fewer = bytes_of_one(100, "HNSW_SQ, fewer segments", 8.0, Kept("HNSW_SQ"))
    assert fewer == bytes_of(100, 8, Kept("HNSW_SQ"))


@pytest.mark.parametrize(
    ("kept", "on_disk", "beside"),
    [(None, False, 300 * 32), (None, True, 0), (Kept("IVF_SQ8"), False, 0)],
)
def test_vectors_stay_in_memory_beside_codes_of_qdrant_unless_they_are_on_disk(
    kept: Kept | None, on_disk: bool, beside: int
) -> None:
    codes = bytes_of_one(300, "int8 codes", 8.0, kept)
    assert bytes_of_one(300, "int8 codes", 8.0, kept, on_disk=on_disk) == codes + beside
    floats = bytes_of_one(300, "vectors", 32.0, None, on_disk=on_disk)
    assert floats == bytes_of_one(300, "vectors", 32.0, None)
