"""The data sets that travel with the repository: verified at load, ready to train on.

A data set is a :class:`Source`: where its file lies, its SHA-256 and a reader. Adding one is adding an entry to
:data:`SOURCES`; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Dataset:
    """Inputs as float32 rows in [0, 1], labels as integers.

    Attributes:
        name: Its key in :data:`SOURCES`.
        train_inputs: ``[examples, features]``.
        train_labels: ``[examples]``.
        test_inputs: ``[examples, features]``.
        test_labels: ``[examples]``.
    """

    name: str
    train_inputs: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_inputs: NDArray[np.float32]
    test_labels: NDArray[np.int64]


class DataError(RuntimeError):
    """A data file is missing or not the one that the studies were run on."""


@dataclass(frozen=True)
class Source:
    """A file in the data folder, its identity and how to read it.

    Attributes:
        file: Name within the folder.
        sha256: Of the file as it lies there.
        origin: Whose data they are and where the file comes from.
        licence: Under which terms they are passed on.
        read: From the verified bytes to inputs and labels, train then test.
    """

    file: str
    sha256: str
    origin: str
    licence: str
    read: Callable[[str, bytes], Dataset]


def read_idx_archive(name: str, packed: bytes) -> Dataset:
    """Four IDX files (train images and labels, test images and labels), concatenated and xz-compressed."""
    raw, offset, arrays = lzma.decompress(packed), 0, []
    for _ in range(4):
        # IDX: two zero bytes, the type (8: unsigned byte), the number of dimensions, then their sizes, big-endian.
        kind, dimensions = raw[offset + 2], raw[offset + 3]
        if kind != 8:
            raise DataError(f"{name}: IDX type {kind} at byte {offset}, expected 8 (unsigned byte).")
        shape = struct.unpack_from(f">{dimensions}I", raw, offset + 4)
        start = offset + 4 + 4 * dimensions
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(raw, np.uint8, count, start).reshape(shape[0], -1))
        offset = start + count
    images, labels, test_images, test_labels = arrays
    return Dataset(
        name,
        images.astype(np.float32) / np.float32(255),
        labels.ravel().astype(np.int64),
        test_images.astype(np.float32) / np.float32(255),
        test_labels.ravel().astype(np.int64),
    )


SOURCES: dict[str, Source] = {
    "mnist": Source(
        file="mnist.idx.xz",
        sha256="7f5adce4a154d636be81d48223bfcc3290fba1ead7c81c9bdba8eece71403ab7",
        origin="Yann LeCun, Corinna Cortes, Christopher Burges: the MNIST database of handwritten digits",
        licence="CC BY-SA 3.0",
        read=read_idx_archive,
    ),
}


def load(name: str, folder: Path = FOLDER) -> Dataset:
    """Load a data set that travels with the repository, after checking its SHA-256.

    Args:
        name: A key of :data:`SOURCES`.
        folder: Where the files lie.

    Raises:
        ValueError: If the name is unknown.
        DataError: If the file is missing or its hash differs.

    Example:
        >>> load("mnist").train_inputs.shape
        (60000, 784)
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {sorted(SOURCES)}, got name = {name!r}.")
    source = SOURCES[name]
    path = folder / source.file
    way_out = f"restore it with `git checkout -- studies/data/{source.file}`"
    if not path.is_file():
        raise DataError(f"{path} is missing; {way_out}.")
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != source.sha256:
        raise DataError(f"{path} has SHA-256 {found}, expected {source.sha256}: the file is not whole; {way_out}.")
    return source.read(name, packed)
