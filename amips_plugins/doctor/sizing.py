"""What of a Qdrant collection fits into the memory there is, and so how to keep it.

What has to be in memory is what every search touches: graph and codes; the vectors may lie on disk
where only the best candidates are scored by them. Measured on 300,000 keys of dimension 384 with
the memory capped, page cache included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Sizing", "size_up"]

_FLOAT = 4  # bytes
_LINKS = 16  # of a point in the graph, by default; the lowest layer has twice as many
_LINK = 4.4  # bytes, with the layers above
_ID = 40  # bytes a point: the ids both ways, and where its payload lies
_SCANNED = 100_000  # keys up to which a scan of all codes costs no more than the call around it

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


def size_up(keys: int, dim: int, memory: int) -> Sizing:
    """Say how to keep keys in so many bytes of memory, the page cache included."""
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
