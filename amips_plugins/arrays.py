"""Arrays in files that nobody vouches for: no pickle, nothing larger than the file.

``numpy.load`` believes what a header says of an array's size before it looks for the numbers, and
unpacks compressed archives of any size. Here an array holds exactly the bytes that the file has.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.errors import BundleCorrupt

__all__ = ["read_npy", "read_npz", "readable", "write_npy", "write_npz"]

_LONGEST_HEADER = 1000


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise ``BundleCorrupt`` for whatever zipfile, numpy and others raise on a damaged file."""
    try:
        yield
    except BundleCorrupt:
        raise
    except Exception as exc:
        raise BundleCorrupt(f"{what} cannot be read ({exc}); publish it again.") from exc


def write_npy(array: npt.NDArray[Any]) -> bytes:
    """Return an array of numbers as ``numpy.save`` writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_npz(**arrays: npt.ArrayLike) -> bytes:
    """Return arrays of numbers by name as ``numpy.savez`` writes them."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(a) for name, a in arrays.items()})
    return buffer.getvalue()


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """Read an array that ``numpy.save`` wrote, not to be changed, or raise ``ValueError``."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of another format version")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, _LONGEST_HEADER)
    except Exception as exc:  # it is parsed as Python literals, and raises what those do
        raise ValueError("an array whose header is none") from exc
    if dtype.kind not in "fi" or dtype.hasobject or fortran or not dtype.isnative:
        raise ValueError(f"an array of {str(dtype)[:40]!r}, which is not what is written")
    if any(size < 0 for size in shape):
        raise ValueError("an array of negative size")
    start = stream.tell()
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array whose shape and length differ")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def read_npz(data: bytes, names: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of these names, and nothing else, that ``numpy.savez`` wrote.

    Raises ``ValueError`` or ``zipfile.BadZipFile``; a damaged archive makes ``zipfile`` raise
    others.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) > len(names):
            raise ValueError("an archive of too many arrays")
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name not in names or name in arrays:
                raise ValueError(f"an archive with {member.filename[:40]!r}")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                raise ValueError("an archive that is compressed")
            arrays[name] = read_npy(archive.read(member))
        return arrays
