"""The data sets of the studies: local first, verified at load, ready to train on; nothing is downloaded unasked.

Adding one is adding a :class:`Source` to :data:`SOURCES`. Files are looked for in the folder that is given, in this one
(MNIST, Shuttle and a text travel with the repository), in ``$ADAPTBATCH_DATA``, where Debian puts them, and in the
user's cache, into which :func:`fetch` downloads on request.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import lzma
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from studies.data.text import Text, read_verses

FOLDER = Path(__file__).parent
# Of the test set, in the origin's table.
ANOMALY_SHARE = 0.35


@dataclass(frozen=True)
class Dataset:
    """Inputs as float32 rows, labels as integers.

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


@dataclass(frozen=True)
class Split:
    """What an anomaly detector is trained, validated and tested on.

    Attributes:
        train: Inputs without anomalies.
        validation: Inputs without anomalies that were not trained on.
        test: Those and anomalies; ``anomalous`` says which.
    """

    train: NDArray[np.float32]
    validation: NDArray[np.float32]
    test: NDArray[np.float32]
    anomalous: NDArray[np.bool_]


class DataError(RuntimeError):
    """A data file is missing or not the one that the studies were run on."""


@dataclass(frozen=True)
class File:
    """A file by its name and the SHA-256 of what is in it; ``url`` is where :func:`fetch` gets it, gzipped or not."""

    name: str
    sha256: str
    url: str | None = None


@dataclass(frozen=True)
class Source:
    """Files, their identity and how to read them.

    Attributes:
        files: In the order in which ``read`` takes them; none for data that come with a package.
        origin: Whose data they are and where the files come from.
        licence: Under which terms they are passed on.
        read: From the verified bytes to inputs and labels, train then test; of a text, to its characters.
        folders: Where a system's packages put the files.
        install: What brings the files, for the error message.
    """

    files: tuple[File, ...]
    origin: str
    licence: str
    read: Callable[[str, Sequence[bytes]], Any]
    folders: tuple[str, ...] = ()
    install: str = ""

    @property
    def sha256(self) -> str:
        """One hash for all files."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


def read_idx_archive(name: str, files: Sequence[bytes]) -> Dataset:
    """Four IDX files (train images and labels, test images and labels), concatenated and xz-compressed."""
    return read_idx(name, [lzma.decompress(files[0])])


def read_idx(name: str, files: Sequence[bytes]) -> Dataset:
    """The same, one by one or concatenated."""
    images, labels, test_images, test_labels = (array for file in files for array in _idx_arrays(name, file))
    return Dataset(
        name,
        images.astype(np.float32) / np.float32(255),
        labels.ravel().astype(np.int64),
        test_images.astype(np.float32) / np.float32(255),
        test_labels.ravel().astype(np.int64),
    )


def _idx_arrays(name: str, raw: bytes) -> Iterator[NDArray[np.uint8]]:
    offset = 0
    while offset < len(raw):
        # IDX: two zero bytes, the type (8: unsigned byte), the number of dimensions, then their sizes, big-endian.
        kind, dimensions = raw[offset + 2], raw[offset + 3]
        if kind != 8:
            raise DataError(f"{name}: IDX type {kind} at byte {offset}, expected 8 (unsigned byte).")
        shape = struct.unpack_from(f">{dimensions}I", raw, offset + 4)
        start = offset + 4 + 4 * dimensions
        count = int(np.prod(shape))
        yield np.frombuffer(raw, np.uint8, count, start).reshape(shape[0], -1)
        offset = start + count


def read_shuttle(name: str, files: Sequence[bytes]) -> Dataset:
    """Nine sensors, label 1 for an anomaly; a fixed fifth of the rows is the test set.

    Each sensor is centred at its median and divided by the spread of its middle 90 %, both of the training rows that
    are no anomalies, and cut off at 5: single readings lie a thousand spreads away and would be the whole loss.
    """
    table = pd.read_csv(io.BytesIO(files[0]))
    order = np.random.default_rng(0).permutation(len(table))
    rows, labels = table.to_numpy(np.float64)[order, :-1], table["anomaly"].to_numpy(np.int64)[order]
    cut = len(rows) * 4 // 5
    normal = rows[:cut][labels[:cut] == 0]
    low, centre, high = np.quantile(normal, [0.05, 0.5, 0.95], axis=0)
    scaled = np.clip((rows - centre) / np.maximum(high - low, 1.0), -5.0, 5.0).astype(np.float32)
    return Dataset(name, scaled[:cut], labels[:cut], scaled[cut:], labels[cut:])


def read_digits(name: str, files: Sequence[bytes]) -> Dataset:
    """The 1,797 digits of 8 x 8 that scikit-learn ships; the last 360 are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs, labels = (digits.data / 16.0).astype(np.float32), digits.target.astype(np.int64)
    return Dataset(name, inputs[:-360], labels[:-360], inputs[-360:], labels[-360:])


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

SOURCES: dict[str, Source] = {
    "mnist": Source(
        files=(File("mnist.idx.xz", "7f5adce4a154d636be81d48223bfcc3290fba1ead7c81c9bdba8eece71403ab7"),),
        origin="Yann LeCun, Corinna Cortes, Christopher Burges: the MNIST database of handwritten digits",
        licence="CC BY-SA 3.0",
        read=read_idx_archive,
        install="restore it with `git checkout -- studies/data/mnist.idx.xz`",
    ),
    "fashion": Source(
        files=tuple(
            File(name, sha256, f"{_FASHION}/{name}.gz")
            for name, sha256 in (
                ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
                ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
                ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
                ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
            )
        ),
        origin="Han Xiao, Kashif Rasul, Roland Vollgraf: Fashion-MNIST (Zalando Research)",
        licence="MIT",
        read=read_idx,
        folders=("/usr/share/datasets/fashion-mnist",),
        install="get it with `python -m studies fetch fashion` or `apt-get install dataset-fashion-mnist`",
    ),
    "shuttle": Source(
        files=(File("shuttle.csv.gz", "1ed4bfa77233d95bff2c8ab2482725d2d800410daedf5919ad80ec6faf60ff59"),),
        origin="NASA, by way of UCI Statlog (Shuttle) in the form of ODDS: the file of the PyPI package river 0.26.1",
        licence="CC BY 4.0",
        read=lambda name, files: read_shuttle(name, [gzip.decompress(files[0])]),
        install="restore it with `git checkout -- studies/data/shuttle.csv.gz`",
    ),
    "digits": Source(
        files=(),
        origin="E. Alpaydin and C. Kaynak: optical recognition of handwritten digits (UCI), as scikit-learn ships it",
        licence="CC BY 4.0",
        read=read_digits,
    ),
    "kjv": Source(
        files=(File("kjv.txt.xz", "5ad9286f43d021be1ac1fc076989b0ab72bec9793035b6df1dc4c9f8f2f7aecb"),),
        origin="the King James Version of 1611, as Debian's bible-kjv 4.38 prints it: bible -f -l9999 gen1:1-rev22:21",
        licence="public domain",
        read=lambda name, files: read_verses(files),
        install="restore it with `git checkout -- studies/data/kjv.txt.xz`",
    ),
}


@functools.lru_cache(maxsize=2)
def load(name: str, folder: Path | None = None) -> Any:
    """Load a data set after checking the SHA-256 of what it is read from.

    Args:
        name: A key of :data:`SOURCES`.
        folder: Where alone to look; None: this folder, ``$ADAPTBATCH_DATA``, the system's, the user's cache.

    Returns:
        A :class:`Dataset`; of a text, a :class:`.Text`.

    Raises:
        ValueError: If the name is unknown.
        DataError: If a file is missing or its hash differs.

    Example:
        >>> load("mnist").train_inputs.shape
        (60000, 784)
    """
    source = _source(name)
    return source.read(name, [_verified(file, name, folder) for file in source.files])


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name must be one of {sorted(SOURCES)}, got name = {name!r}.")
    return SOURCES[name]


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("adaptbatch"))


def _places(source: Source, name: str) -> list[Path]:
    own = os.environ.get("ADAPTBATCH_DATA")
    places = [FOLDER, *([Path(own), Path(own) / name] if own else []), *map(Path, source.folders)]
    return places if source.files[0].url is None else [*places, _cache() / name]


def _verified(file: File, name: str, folder: Path | None) -> bytes:
    source = SOURCES[name]
    places = _places(source, name) if folder is None else [folder]
    paths = [place / variant for place in places for variant in (file.name, f"{file.name}.gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{places[0] / file.name} is missing, looked in {len(places)} folders; {source.install}.")
    raw = path.read_bytes()
    try:
        content = gzip.decompress(raw) if path.name == f"{file.name}.gz" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not whole ({error}); {source.install}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(f"{path} has SHA-256 {found}, expected {file.sha256}: the file is not whole; {source.install}.")
    return content


def fetch(name: str) -> Path:
    """Download a data set's files into the user's cache, where they are missing, and verify them.

    Raises:
        ValueError: If the name is unknown.
        DataError: If a file that arrived is not the one that the studies were run on.
    """
    import pooch

    source = _source(name)
    for file in source.files:
        if file.url is not None:
            pooch.retrieve(file.url, known_hash=None, fname=f"{file.name}.gz", path=_cache() / name)
    load.cache_clear()
    load(name)
    return _cache() / name


def text(name: str) -> Text:
    """Load a text, as :func:`load` does.

    Example:
        >>> found = text("kjv")
        >>> len(found.vocabulary), "".join(found.vocabulary[index] for index in found.train[:16])
        (63, 'In the beginning')
    """
    found: Text = load(name)
    return found


@functools.lru_cache(maxsize=2)
def split(name: str, anomaly: int | None) -> Split:
    """A data set as anomaly detection: one class is the anomaly and is not trained on.

    The test set has all normal test rows and so many anomalies, of both sets, that they are 35 % of it (fewer where
    there are no more). Rows are in a fixed random order.

    Args:
        name: A key of :data:`SOURCES`.
        anomaly: The label of the anomaly; None: no anomalies, all rows are trained on and tested.

    Raises:
        ValueError: If no row has that label.

    Example:
        >>> parts = split("mnist", 0)
        >>> len(parts.train), len(parts.validation), round(float(parts.anomalous.mean()), 2)
        (54077, 9020, 0.35)
    """
    found: Dataset = load(name)
    if anomaly is None:
        test = found.test_inputs
        return Split(found.train_inputs, test, test, np.zeros(len(test), bool))
    held_out, unseen = found.train_labels == anomaly, found.test_labels == anomaly
    if not held_out.any():
        labels = sorted(set(found.train_labels.tolist()))
        raise ValueError(f"anomaly must be one of the labels {labels} of {name}, got anomaly = {anomaly!r}.")
    validation = found.test_inputs[~unseen]
    anomalies = np.concatenate([found.test_inputs[unseen], found.train_inputs[held_out]])
    anomalies = anomalies[: round(len(validation) * ANOMALY_SHARE / (1 - ANOMALY_SHARE))]
    order = np.random.default_rng(0).permutation(len(validation) + len(anomalies))
    test = np.concatenate([validation, anomalies])[order]
    # The probe is the first rows of the validation set: in the file they are in the order of collection.
    shuffled = np.random.default_rng(1).permutation(len(validation))
    return Split(found.train_inputs[~held_out], validation[shuffled], test, order >= len(validation))
