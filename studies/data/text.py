"""A public-domain text as characters, split by books."""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Books without a parallel among the others, as Kings has in Chronicles and Mark in Matthew; about 6 % of the text each.
VALIDATION_BOOKS = ("Josh", "Job", "Rom")
TEST_BOOKS = ("Jdgs", "Prv", "1Cor")
_VERSE = re.compile(r"(\d?[A-Za-z]+)\d+:\d+ (.*)")


@dataclass(frozen=True)
class Text:
    """Characters as indices into ``vocabulary``.

    Attributes:
        vocabulary: All characters, sorted.
        train, validation, test: ``[characters]``, whole books each.
    """

    vocabulary: str
    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]


def read_verses(files: Sequence[bytes]) -> Text:
    """One xz-compressed file, a verse a line after its book, chapter and number; those are left out.

    Raises:
        ValueError: If a line is no verse.
    """
    books: dict[str, list[str]] = {}
    for line in lzma.decompress(files[0]).decode("ascii").splitlines():
        verse = _VERSE.fullmatch(line)
        if verse is None:
            raise ValueError(f"a line must be a verse, got {line[:40]!r}.")
        books.setdefault(verse[1], []).append(verse[2])
    held_out = {*VALIDATION_BOOKS, *TEST_BOOKS}
    parts = [
        "".join("\n".join(books[book]) + "\n\n" for book in names)
        for names in ([book for book in books if book not in held_out], VALIDATION_BOOKS, TEST_BOOKS)
    ]
    vocabulary = "".join(sorted(set("".join(parts))))
    index = np.zeros(128, np.uint8)
    index[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    train, validation, test = (index[np.frombuffer(part.encode("ascii"), np.uint8)] for part in parts)
    return Text(vocabulary, train, validation, test)
