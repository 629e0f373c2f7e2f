"""What of a collection fits into the memory there is, and so how to keep it.

What has to be in memory is what every search touches: graph and codes; the vectors may lie on disk
where only the best candidates are scored by them. Of Qdrant measured on 300,000 keys of dimension
384 with the memory capped, page cache included. Of Milvus the sizes of whole vectors are
those that a server 2.3.5 took (docs/performance.md), those of codes are their bytes; nothing was
measured under a cap, and cells of codes lost to lists of them where they were compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from amips_plugins.errors import InvalidInput

__all__ = ["Kept", "Sizing", "bytes_of", "bytes_of_build", "size_up"]

_FLOAT = 4  # bytes
_LINKS = 16  # of a point in the graph, by default; the lowest layer has twice as many
_LINK = 4.4  # bytes, with the layers above
_ID = 40  # bytes a point: the ids both ways, and where its payload lies
_SCANNED = 100_000  # keys up to which a scan of all codes costs no more than the call around it

_ROW = 100  # bytes of a Milvus row beside its vector, without the id's own
_PER_DIMENSION = {  # bytes, by Milvus' names of kinds
    "HNSW_SQ": 1.0,
    "IVF_SQ8": 1.0,
    "IVF_PQ": 0.25,
    "IVF_RABITQ": 0.125,
    "SCANN": 4.25,  # codes, and the vectors themselves
    "DISKANN": 0.9,  # codes and cache; the graph lies on the disk
}

Keep = Literal["vectors", "codes and graph", "codes, scanned", "codes in cells", "cell file"]


@dataclass(frozen=True, slots=True)
class Sizing:
    """How to keep a collection: what in memory, and with codes of how many bits (32 for none).

    ``needed`` are bytes of memory, ``text`` is the advice in a sentence.
    """

    keep: Keep
    bits: int
    needed: int
    text: str


@dataclass(frozen=True, slots=True)
class Kept:
    """How Milvus keeps a collection now.

    ``index`` is its name of the kind; ``mapped`` says that files are mapped (mmap), ``id_bytes``
    how long an id is; ``coded_graphs`` whether the server has HNSW_SQ.
    """

    index: str
    mapped: bool = False
    id_bytes: float = 8.0
    coded_graphs: bool = False


def size_up(
    keys: int, dim: int, memory: int, database: str = "qdrant", kept: Kept | None = None
) -> Sizing:
    """Say how to keep keys in so many bytes of memory, the page cache included.

    Raises ``InvalidInput`` for a database of which sizes are not known.
    """
    if kept is not None:
        return _size_up_milvus(keys, dim, memory, kept)
    if not database.startswith("qdrant"):
        raise InvalidInput(
            "How a collection fits into a memory is known of Qdrant and Milvus servers only; leave "
            "out --memory."
        )
    return _size_up_qdrant(keys, dim, memory)


def bytes_of(keys: int, dim: int, kept: Kept) -> int:
    """Return the memory that an index of Milvus and the ids take."""
    graph = 2 * _LINKS * _LINK if kept.index.startswith(("HNSW", "AUTOINDEX")) else 0.0
    vector = dim * _PER_DIMENSION.get(kept.index, _FLOAT)
    return int(keys * (vector + graph + _ROW + kept.id_bytes))


def bytes_of_build(
    keys: int,
    dim: int,
    name: str,
    bytes_per_key: float,
    kept: Kept | None,
    *,
    vectors_on_disk: bool,
) -> int:
    """Return the memory that one way to build an index takes (``tuning.Build``).

    Qdrant keeps the vectors in memory beside codes of them, unless they are on disk.
    """
    if kept is not None:
        kind = name.partition(",")[0]  # the same in fewer segments takes as much
        return bytes_of(keys, dim, replace(kept, index=kind))
    beside = not vectors_on_disk and bytes_per_key < _FLOAT * dim
    needed = int(keys * (bytes_per_key + 2 * _LINKS * _LINK + _ID))
    return needed + (keys * dim * _FLOAT if beside else 0)


def _size_up_milvus(keys: int, dim: int, memory: int, kept: Kept) -> Sizing:
    now, have = bytes_of(keys, dim, kept), f"of the {_amount(memory)} there are"
    if now <= memory:
        whole = _PER_DIMENSION.get(kept.index, _FLOAT) >= _FLOAT
        keep: Keep = "vectors" if whole else "codes, scanned"
        if not whole and kept.index.startswith("HNSW"):
            keep = "codes and graph"
        bits = 32 if whole else round(8 * _PER_DIMENSION[kept.index])
        text = f"Its {kept.index} index and ids take {_amount(now)} {have}: it fits as it is."
        return Sizing(keep, bits, now, text)
    would = f"Its {kept.index} index and ids would take {_amount(now)} {have}"
    if kept.mapped:
        would += ", and mapped (mmap) it reads the rest from the disk"
    ways: list[tuple[str, Keep, int]] = [
        ("HNSW_SQ", "codes and graph", 8),
        ("IVF_SQ8", "codes, scanned", 8),
        ("IVF_PQ", "codes, scanned", 2),
    ]
    for kind, keep, bits in ways:
        needed = bytes_of(keys, dim, replace(kept, index=kind))
        if needed <= memory and (kind != "HNSW_SQ" or kept.coded_graphs):
            return Sizing(
                keep,
                bits,
                needed,
                f"{would}, {kind} {_amount(needed)}: build that, with the vectors mapped (mmap) "
                "where candidates are scored by them.",
            )
    return Sizing(
        "cell file",
        2,
        needed,
        f"{would}, and not even IVF_PQ fits ({_amount(needed)}): spread it over more query nodes, "
        "or write its cells into a cell file (amips cell-file), where each is one read.",
    )


def _size_up_qdrant(keys: int, dim: int, memory: int) -> Sizing:
    ids, graph = keys * _ID, int(keys * 2 * _LINKS * _LINK)
    sizes = {bits: keys * dim * bits // 8 for bits in (8 * _FLOAT, 8, 4, 2)}
    whole = sizes[32] + graph + ids
    have = f"of the {_amount(memory)} there are"
    if whole <= memory:
        return Sizing(
            "vectors",
            32,
            whole,
            f"Vectors and graph take {_amount(whole)} {have}: keep them in memory and search the "
            "graph, for which int8 or 4-bit codes with rescoring take half the CPU.",
        )
    for bits in (8, 4):
        needed = sizes[bits] + graph + ids
        if needed <= memory:
            return Sizing(
                "codes and graph",
                bits,
                needed,
                f"Vectors and graph would take {_amount(whole)} {have}, the graph and {bits}-bit "
                f"codes {_amount(needed)}: keep these in memory, the vectors on disk, and rescore.",
            )
    needed = sizes[2] + ids
    if needed <= memory:
        keep: Keep = "codes, scanned" if keys <= _SCANNED else "codes in cells"
        how = "scan them all" if keys <= _SCANNED else "route to cells of them (hnsw_config.m=0)"
        return Sizing(
            keep,
            2,
            needed,
            f"A graph does not fit, but 2-bit codes do, in {_amount(needed)} {have}: keep these in "
            f"memory, the vectors on disk, {how}, and rescore.",
        )
    return Sizing(
        "cell file",
        2,
        needed,
        f"Not even 2-bit codes fit ({_amount(needed)} {have}): write its cells into a cell file "
        "(amips cell-file), where each is one read, or leave it native with a graph on disk that "
        "holds vectors beside its links (hnsw_config.inline_storage); cells inside the database "
        "read too many pages here.",
    )


def _amount(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
