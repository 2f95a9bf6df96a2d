"""The two hashes of a cell, and the random key of a trial: the same on all machines and in any order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import struct
from typing import Any

import numpy as np

from moejax.sweep.trial.settings import ADDED_LATER, AlgorithmSettings, DataSettings


def canonical_json(content: Any) -> str:
    """JSON with sorted keys and no spaces; floats by their shortest exact decimal form."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _settings_json(settings: DataSettings | AlgorithmSettings) -> str:
    """The settings, without fields that were added later and have their default: results of before keep their keys."""
    values = {name: getattr(settings, name) for name in _field_names(type(settings))}
    return canonical_json(
        {
            name: value
            for name, value in values.items()
            if name not in ADDED_LATER or value != ADDED_LATER[name]
        }
    )


@functools.cache
def _field_names(settings: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(settings))


@functools.lru_cache(maxsize=4096)
def _algorithm_json(algorithm: AlgorithmSettings) -> str:
    return _settings_json(algorithm)


def data_hash(data: DataSettings) -> str:
    """sha256, in hex, of the truth and data fields, n included: it seeds the sample, which all methods share."""
    return hashlib.sha256(f'{{"data":{_settings_json(data)}}}'.encode()).hexdigest()


def result_hash(data: str, algorithm: AlgorithmSettings, seed: int, plugins: str) -> str:
    """sha256, in hex, of all that a result depends on: the key of the store.

    Args:
        data: the cell's `data_hash`.
        algorithm: method and algorithm fields.
        seed: the spec's seed (the data are drawn from it, so results of two seeds are never confused).
        plugins: digest of the plugins' source, empty without one.
    """
    rest = f'{{"data":"{data}","plugins":"{plugins}","seed":{seed}}}'  # this is canonical JSON, because the strings are hex
    return hashlib.sha256(f'{{"algorithm":{_algorithm_json(algorithm)},"rest":{rest}}}'.encode()).hexdigest()


def trial_key(seed: int, data: str, trial: int) -> np.ndarray:
    """Raw Threefry key data, (2,) uint32, of a trial: 64 bits of the sha256 of seed, data hash and trial.

    It is computed without JAX, so that planning touches no device; use it with `jax.random.wrap_key_data`.
    Two keys among 10^6 trials coincide with probability 3e-8.

    Examples:
        >>> key = moejax.sweep.trial_key(seed=0, data="ab" * 32, trial=3)
        >>> key.shape, str(key.dtype)
        ((2,), 'uint32')
    """
    digest = hashlib.sha256(b"moejax-trial" + struct.pack("<qq", seed, trial) + bytes.fromhex(data)).digest()
    return np.frombuffer(digest[:8], dtype="<u4").astype(np.uint32)
