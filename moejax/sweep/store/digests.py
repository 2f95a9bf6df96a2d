"""A 64-bit digest of every row of a store, so that a flipped bit is found before the number is used.

The digest of a row is a sum over its columns, modulo 2^64, of mix(bits(value) xor salt(column)), with `mix` the finaliser of
SplitMix64 (Steele, Lea, Flood 2014), a bijection. So a change of one number always changes the sum, and a change of several is
missed with probability 2^-64. NULL (as SQLite stores NaN) adds nothing, so that a column that is added later, empty for old rows,
does not change their digests. The digests guard against damage, not against fraud.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIGEST_COLUMN = "digest"
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "INTEGER": (int,),
    "REAL": (float, int),
    "TEXT": (str, bytes),
    "BLOB": (bytes,),
}
"""Types of a column's values by its declared type; texts are bytes if a reader does not decode them."""


def row_digests(kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], rows: int) -> list[int]:
    """The digests of rows.

    Args:
        kinds: declared type of each column: INTEGER, REAL, TEXT or BLOB.
        columns: the (rows,) values of each column; the digest itself, and columns without a value, may be missing.
        rows: the number of rows.

    Returns:
        Signed 64-bit numbers, as SQLite stores them.
    """
    return _digests(kinds, columns, rows).tolist()


def digests_hold(kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], rows: int) -> np.ndarray:
    """(rows,) bool: true if the digest in the columns is that of the row."""
    kept, found = columns[DIGEST_COLUMN], _digests(kinds, columns, rows)
    if set(map(type, kept)) <= {int}:
        return np.array(kept, dtype=np.int64) == found
    return np.array([one == other for one, other in zip(kept, found.tolist(), strict=True)], bool)


def _digests(kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], rows: int) -> np.ndarray:
    total = np.zeros(rows, np.uint64)
    for name, values in columns.items():
        if name != DIGEST_COLUMN:
            total += _mixed(name, kinds[name], values)
    return total.view(np.int64)


def well_typed(kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], rows: int) -> np.ndarray:
    """(rows,) bool: true if every value has its column's type, and every text is UTF-8."""
    good = np.ones(rows, bool)
    for name, values in columns.items():
        accepted = (*_ACCEPTED[kinds[name]], type(None))
        if not set(map(type, values)) <= set(accepted):
            good &= np.array([type(value) in accepted for value in values], bool)
        if kinds[name] == "TEXT":
            sound = {value: _is_utf8(value) for value in set(values)}
            if not all(sound.values()):
                good &= np.array([sound[value] for value in values], bool)
    return good


def _is_utf8(value: Any) -> bool:
    try:
        return not isinstance(value, bytes) or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _mixed(name: str, kind: str, values: Sequence[Any]) -> np.ndarray:
    """(rows,) uint64: the contribution of one column."""
    plain = {"REAL": (float, int, type(None)), "INTEGER": (int,)}.get(kind, ())
    odd = (
        []
        if set(map(type, values)) <= set(plain)
        else [i for i, v in enumerate(values) if type(v) not in plain]
    )
    known: dict[tuple[type, Any], int] = {}
    given: list[Any] = []
    if odd:
        known = {key: _bits_of(key[1]) for key in {(type(values[index]), values[index]) for index in odd}}
        values = list(values)
        given = [values[index] for index in odd]
        for index in odd:
            values[index] = 0
    if kind == "REAL":
        numbers = np.array(values, dtype=np.float64) + 0.0  # SQLite stores -0.0 as 0.0
        bits, empty = numbers.view(np.uint64), np.isnan(numbers)
    else:
        bits, empty = np.array(values, dtype=np.int64).view(np.uint64), np.zeros(len(values), bool)
    if odd:
        bits = bits.copy()
        bits[odd] = [known[type(value), value] for value in given]
        empty[odd] = [value is None for value in given]
    return np.where(empty, np.uint64(0), _mix(bits ^ _salt(name)))


@functools.cache
def _salt(name: str) -> np.uint64:
    return np.uint64(_bits_of(name))


def _bits_of(value: Any) -> int:
    """64 bits of a text's or blob's BLAKE2; a value of another type, which is damage, enters by its repr."""
    if isinstance(value, str):
        content = value.encode()
    else:
        content = value if isinstance(value, bytes) else repr((type(value).__name__, value)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
