"""The check of a worker before it gets a chunk: its code must be the coordinator's.

The coordinator sends the text of this file (`Admission`), because a worker may lack moejax or have a different one. So only
the standard library is imported until the answer is known.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import pickle
import platform
from pathlib import Path

PACKAGE = "moejax"
COMPARED = ("source", "jax", "jaxlib")
"""Entries of `installed` that must be equal before a worker may import the package."""


def source_digest(folder: Path) -> str:
    """sha256, in hex, of all Python files of a package: a change of one line changes the digest."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def version(name: str) -> str:
    """Version of an installed package; "unknown" if it was never installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def installed() -> dict[str, str]:
    """Versions, and the digest of moejax's source, found without importing any of it.

    Raises:
        ModuleNotFoundError: moejax is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}")
    return {
        "moejax": version(PACKAGE),
        "source": source_digest(Path(spec.origin).parent),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
    }


def numeric_settings() -> dict[str, str]:
    """JAX's precision and random number generator in this process."""
    import jax

    values = jax.config.values
    split = "partitionable" if values["jax_threefry_partitionable"] else "not partitionable"
    return {
        "precision": "float64" if values["jax_enable_x64"] else "float32",
        "prng": f"{values['jax_default_prng_impl']}, {split}",
    }


def refusal(expected: dict[str, str], settings: bytes) -> str:
    """Prepare this process for chunks; returns one line with the reason if it cannot run them, else an empty text.

    Args:
        expected: the coordinator's `installed` and `numeric_settings`.
        settings: the coordinator's pickled `WorkerSettings`.
    """
    where = platform.node()
    try:
        found = installed()
        for name in COMPARED:
            if found[name] != expected[name]:
                what = (
                    f"another source of moejax {found['moejax']}"
                    if name == "source"
                    else f"{name} {found[name]}"
                )
                return f"{where} has {what}, and here is {_short(expected, name)}"
        from moejax.sweep.execution.worker import configure

        configure(pickle.loads(settings))
        for name, value in numeric_settings().items():
            if value != expected[name]:
                return f"{where} has {name} {value}, and here is {expected[name]}"
    except Exception as error:  # after any error, the worker gets no chunk, and the reason is reported
        return " ".join(f"{where}: {type(error).__name__}: {error}".split())[:300]
    return ""


def _short(expected: dict[str, str], name: str) -> str:
    return (
        f"{expected['moejax']} with digest {expected['source'][:12]}" if name == "source" else expected[name]
    )
