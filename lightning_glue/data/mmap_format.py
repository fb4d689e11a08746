"""fairseq's mmap format for lists of id arrays: ``<prefix>.bin`` and ``<prefix>.idx``.

Byte for byte what ``MMapIndexedDatasetBuilder`` of ``fairseq/data/indexed_dataset.py`` writes, without a loop over
sentences.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from lightning_glue.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}


def best_dtype(vocabulary_size: int) -> type[np.generic]:
    """The integer type fairseq chooses for a vocabulary (``best_fitting_int_dtype``)."""
    if vocabulary_size < 65500:
        return np.uint16
    return np.uint32 if vocabulary_size < 4294967295 else np.int64


def write(prefix: Path, ids: np.ndarray, lengths: np.ndarray, vocabulary_size: int) -> None:
    """Write items stored one after the other in ``ids`` (sum of lengths,) with ``lengths`` (items,)."""
    dtype = np.dtype(best_dtype(vocabulary_size))
    code = next(code for code, kind in _CODES.items() if np.dtype(kind) == dtype)
    ids.astype(dtype).tofile(prefix.with_name(prefix.name + ".bin"))
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    with open(prefix.with_name(prefix.name + ".idx"), "wb") as file:
        file.write(_MAGIC + struct.pack("<BQ", code, len(lengths)))
        file.write(lengths.astype(np.int32).tobytes())
        file.write(pointers.tobytes())


def read(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map ``<prefix>.bin`` into memory and read its index.

    Returns:
        ids: (sum of lengths,) read-only array on the file.
        lengths: (items,) int64.
    """
    index = prefix.with_name(prefix.name + ".idx")
    data = prefix.with_name(prefix.name + ".bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(f"{path} is missing; expected the .bin and .idx that preprocessing writes")
    header = index.read_bytes()
    start = len(_MAGIC) + 9
    if header[: len(_MAGIC)] != _MAGIC or len(header) < start:
        raise DataError(f"{index} is no fairseq mmap index; preprocess the data again")
    code, count = struct.unpack("<BQ", header[len(_MAGIC) : start])
    if code not in _CODES or len(header) != start + 12 * count:
        raise DataError(f"{index} is damaged: its {len(header)} bytes are not {count} items; preprocess the data again")
    dtype = np.dtype(_CODES[code])
    lengths = np.frombuffer(header, dtype=np.int32, count=count, offset=start).astype(np.int64)
    pointers = np.frombuffer(header, dtype=np.int64, count=count, offset=start + 4 * count)
    if (lengths < 0).any() or (pointers != (np.cumsum(lengths) - lengths) * dtype.itemsize).any():
        raise DataError(f"{index} is damaged: its items do not follow one another; preprocess the data again")
    if data.stat().st_size != int(lengths.sum()) * dtype.itemsize:
        raise DataError(
            f"{data} holds {data.stat().st_size} bytes, its index says {int(lengths.sum()) * dtype.itemsize}"
        )
    if not lengths.sum():
        return np.empty(0, dtype=dtype), lengths
    return np.memmap(data, dtype=dtype, mode="r"), lengths
