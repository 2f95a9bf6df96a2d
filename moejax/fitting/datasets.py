"""Real data sets by name, from a folder, the cache or the UCI repository."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.environment import cache_folder
from moejax.fitting.tables import Dataset, read_table
from moejax.registry import nearest

__all__ = ["BUILT_IN", "STOCK_PERIODS", "STOCK_TARGETS", "Dataset", "load", "read_table"]

UCI_ADDRESS = "https://archive.ics.uci.edu/static/public"
"""Address of UCI's archives; MOEJAX_UCI_ADDRESS names another one, such as a mirror."""
TIMEOUT = 30.0
"""Seconds without an answer after which a download fails."""


@dataclasses.dataclass(frozen=True)
class _Published:
    """A data set of the UCI repository, and the hashes that identify its file."""

    archive: str
    """Path of its archive below UCI_ADDRESS."""
    file: str
    """Name of the file in the archive."""
    plain_name: str
    """Its name in the cache, which a file in a folder may have too."""
    sha256: str
    """SHA-256 of the raw file."""
    read: Callable[..., Dataset]
    """(bytes, **options) -> Dataset."""
    variants: tuple[dict[str, Any], ...] = ()
    """The options with which `read` covers all numbers of a workbook."""
    numbers_sha256: str | None = None
    """SHA-256 of those numbers: a workbook that was opened and saved again has different bytes."""


def _read_airfoil(content: bytes) -> Dataset:
    table = pd.read_csv(io.BytesIO(content), sep="\t", header=None)
    inputs = ("frequency_hz", "angle_deg", "chord_m", "velocity_m_per_s", "displacement_thickness_m")
    return _dataset(table, inputs, ("sound_pressure_db",))


def _read_concrete(content: bytes) -> Dataset:
    table = _sheet(content, 0).iloc[1:]
    parts = (
        "cement",
        "blast_furnace_slag",
        "fly_ash",
        "water",
        "superplasticizer",
        "coarse_aggregate",
        "fine_aggregate",
    )
    inputs = (*(f"{part}_kg_per_m3" for part in parts), "age_days")
    return _dataset(table, inputs, ("compressive_strength_mpa",))


STOCK_INPUTS = (
    "large_book_to_price",
    "large_return_on_equity",
    "large_sales_to_price",
    "large_return_of_last_quarter",
    "large_market_value",
    "small_systematic_risk",
)
STOCK_TARGETS = (
    "annual_return",
    "excess_return",
    "systematic_risk",
    "total_risk",
    "absolute_win_rate",
    "relative_win_rate",
)
STOCK_PERIODS = ("all period", "1st period", "2nd period", "3rd period", "4th period")


def _read_stock_portfolio(
    content: bytes, *, period: str = STOCK_PERIODS[0], normalised: bool = False
) -> Dataset:
    table = _sheet(content, period).iloc[2:]  # two header rows
    if table.shape[1] < 19:
        raise ValueError(f"expected 19 columns, got {table.shape[1]}")
    first = 13 if normalised else 7
    table = table.iloc[:, [*range(1, 7), *range(first, first + 6)]]
    return _dataset(table, STOCK_INPUTS, STOCK_TARGETS)


_PUBLISHED = {
    "airfoil": _Published(
        archive="291/airfoil+self+noise.zip",
        file="airfoil_self_noise.dat",
        plain_name="airfoil_self_noise.dat",
        sha256="74c75fd71783f1e6b71f8a622b993dc592897a97cd689c5090a07147a1b097b3",
        read=_read_airfoil,
    ),
    "concrete": _Published(
        archive="165/concrete+compressive+strength.zip",
        file="Concrete_Data.xls",
        plain_name="Concrete_Data.xls",
        sha256="1ecf19eb1c78cf20599f6ef90dd41af6ff99b496095bd9903483c1fec418f522",
        read=_read_concrete,
        variants=({},),
        numbers_sha256="9f822f7f65b240d9a200613a72565d48d4e5b86199a417de03ee1327810f4325",
    ),
    "stock_portfolio": _Published(
        archive="390/stock+portfolio+performance.zip",
        file="stock portfolio performance data set.xlsx",
        plain_name="stock_portfolio_performance.xlsx",
        sha256="4fd8af861fe7d214242c521807648ba1844caaa14300e073ac69a70d51ed345f",
        read=_read_stock_portfolio,
        variants=tuple({"period": p, "normalised": n} for p in STOCK_PERIODS for n in (False, True)),
        numbers_sha256="31b877d29dc514f5b068c0e2ec82b7d778fa9d61f6a338c403f0dff245a30d7a",
    ),
}


def load(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, target: str | None = None, **options: Any
) -> Dataset:
    """A data set by name, in its published units.

    "airfoil": Airfoil Self-Noise (Brooks, Pope, Marcolini 1989), 1503 x 5, sound pressure in dB.
    "concrete": Concrete Compressive Strength (Yeh 1998), 1030 x 8, strength in MPa; 25 rows are duplicates.
    "stock_portfolio": Stock portfolio performance (Liu and Yeh 2017), 63 x 6 with six targets. The inputs are weights that sum
        to 1, so that their covariance has rank 5.
    "diabetes": 442 patients, 10 inputs (Efron et al. 2004), which scikit-learn ships.
    "cars": fuel economy in miles per gallon of 392 cars, 8 inputs (Donoho and Ramos 1982), which vega_datasets ships.
    "engel": food expenditure of 235 households, income the only input (Engel 1857), which statsmodels ships.

    A file is taken from `data_dir`; else from the folder that MOEJAX_DATA_DIR names, if it is there; else from the cache
    (`moejax.environment`); else it is downloaded from the UCI repository, checked and kept in the cache. A download is accepted if
    the raw file has the known SHA-256. A workbook that another program saved again is accepted if its numbers have the known one.
    A file in a folder is the user's own: it is read with any hash, and `source` tells whether it is the published one.

    Args:
        name: one of the above.
        data_dir: a folder that holds the file, under its own name or the one in `moejax.fitting.datasets`; it must be there.
        target: one of several targets; None for all.
        options: for "stock_portfolio": `period`, one of STOCK_PERIODS ("all period"), and `normalised` (False), True for the
            indicators scaled to [0.2, 0.8].

    Raises:
        ValueError: an unknown name, target or option, a folder without the file, a file that is not in the published format, a
            download whose content is not the published one, or a package that is missing.
        OSError: the file is in no folder and could not be downloaded; the message names the remedy.
    """
    if name not in BUILT_IN:
        raise ValueError(f"dataset: unknown name {name!r}; {nearest(name, BUILT_IN)}")
    known = ("period", "normalised") if name == "stock_portfolio" else ()
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: no option of dataset {name!r}; it has {', '.join(known) or 'none'}")
    if options.get("period", STOCK_PERIODS[0]) not in STOCK_PERIODS:
        raise ValueError(f"period: expected one of {', '.join(STOCK_PERIODS)}, got {options['period']!r}")
    if data_dir is not None and name not in _PUBLISHED:
        raise ValueError(f"data_dir: {name!r} is in no folder: it comes with a package")
    data = (
        _load_published(name, _PUBLISHED[name], data_dir, options)
        if name in _PUBLISHED
        else _PACKAGED[name]()
    )
    return data if target is None else data.with_target(target)


def _load_diabetes() -> Dataset:
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes(scaled=False)
    names = tuple(bunch.feature_names)
    return Dataset(bunch.data, bunch.target, names, ("disease progression after one year",), "scikit-learn")


def _load_cars() -> Dataset:
    package = _optional("vega_datasets", "data set 'cars'")
    table = pd.DataFrame(json.loads(package.local_data.cars.raw()))
    inputs = ("Cylinders", "Displacement", "Horsepower", "Weight_in_lbs", "Acceleration")
    table = table.dropna(subset=["Miles_per_Gallon", "Horsepower"])
    columns = [table[name].to_numpy(float) for name in inputs]
    columns.append(table["Year"].str[:4].to_numpy(float))
    columns += [(table["Origin"] == name).to_numpy(float) for name in ("Europe", "Japan")]
    names = (*(name.lower() for name in inputs), "year", "from_europe", "from_japan")
    target = table["Miles_per_Gallon"].to_numpy(float)
    return Dataset(np.stack(columns, axis=1), target, names, ("miles_per_gallon",), "vega_datasets")


def _load_engel() -> Dataset:
    module = _optional("statsmodels.datasets.engel", "data set 'engel'")
    table = module.load_pandas().data
    income, food = (table[name].to_numpy(float) for name in ("income", "foodexp"))
    return Dataset(income[:, None], food, ("income",), ("food_expenditure",), "statsmodels")


_PACKAGED: dict[str, Callable[[], Dataset]] = {
    "diabetes": _load_diabetes,
    "cars": _load_cars,
    "engel": _load_engel,
}
BUILT_IN = (*_PUBLISHED, *_PACKAGED)


def _load_published(
    name: str, published: _Published, data_dir: str | os.PathLike[str] | None, options: dict[str, Any]
) -> Dataset:
    path = _file_in_folder(name, published, data_dir)
    if path is not None:
        content = path.read_bytes()
        same = hashlib.sha256(content).hexdigest() == published.sha256
        data = _parsed(published, content, str(path), options)
        return data._replace(
            source=f"{path}, {'the published file' if same else 'not byte for byte the published file'}"
        )
    kept = cache_folder()
    cached = None if kept is None else kept / "datasets" / published.plain_name
    if cached is not None and cached.is_file():
        content = cached.read_bytes()
        if _is_published(published, content):  # a damaged file is fetched again
            return _parsed(published, content, str(cached), options)._replace(
                source=f"{cached}, downloaded before"
            )
    address = (os.environ.get("MOEJAX_UCI_ADDRESS") or UCI_ADDRESS).rstrip("/") + "/" + published.archive
    content = _download(name, published, address)
    data = _parsed(published, content, address, options)
    if cached is not None:
        _write_whole(cached, content)
    return data._replace(source=f"{address}, checked")


def _file_in_folder(name: str, published: _Published, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The file in `data_dir`, or in MOEJAX_DATA_DIR; None if no `data_dir` was given and the latter lacks it."""
    chosen = data_dir if data_dir is not None else os.environ.get("MOEJAX_DATA_DIR")
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    setting = "data_dir" if data_dir is not None else "MOEJAX_DATA_DIR"
    if not folder.is_dir():
        raise ValueError(f"{setting}: expected a folder, got {str(folder)!r}")
    names = dict.fromkeys((published.plain_name, published.file))  # each name once
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    if data_dir is None:
        return None
    raise ValueError(f"{setting}: {folder} has no {' or '.join(map(repr, names))}, the file of {name!r}")


def _download(name: str, published: _Published, address: str) -> bytes:
    """The raw file from UCI's archive, checked."""
    pooch = _optional("pooch", "a download")
    advice = (
        f"connect to the network, or put {published.file!r} into a folder and name it by MOEJAX_DATA_DIR "
        "or --data-dir"
    )
    import requests

    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "archive.zip"
        try:
            pooch.HTTPDownloader(timeout=TIMEOUT)(address, str(archive), None)
        except requests.exceptions.HTTPError as error:
            answer = error.response
            reason = "the server refused" if answer is None else f"the server answered {answer.status_code}"
            raise OSError(f"dataset {name!r}: {address}: {reason}; {advice}") from error
        except (requests.exceptions.RequestException, OSError) as error:
            reason = f"{type(error).__name__}: no complete answer"
            raise OSError(f"dataset {name!r}: {address}: {reason}; {advice}") from error
        try:
            with zipfile.ZipFile(archive) as members:
                wanted = [
                    member
                    for member in members.namelist()
                    if member.rsplit("/", 1)[-1].lower() == published.file.lower()
                ]
                content = members.read(wanted[0]) if wanted else None
                held = ", ".join(members.namelist())
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"dataset {name!r}: {address}: not a zip archive ({error}); {advice}") from error
    if content is None:
        raise ValueError(
            f"dataset {name!r}: {address}: expected a member {published.file!r}, got {held}; {advice}"
        )
    if not _is_published(published, content):
        raise ValueError(
            f"dataset {name!r}: {address}: {published.file!r} has the wrong content: SHA-256 expected {published.sha256}, "
            f"got {hashlib.sha256(content).hexdigest()}; nothing was kept"
        )
    return content


def _is_published(published: _Published, content: bytes) -> bool:
    """True if these are the published bytes or, in a workbook saved again, the published numbers."""
    if hashlib.sha256(content).hexdigest() == published.sha256:
        return True
    if published.numbers_sha256 is None:
        return False
    try:
        return _digest_of_numbers(published, content) == published.numbers_sha256
    except ValueError:  # it cannot be read, so it is not the published file
        return False


def _digest_of_numbers(published: _Published, content: bytes) -> str:
    """SHA-256 of all numbers of a workbook, to ten digits, row by row."""
    digest = hashlib.sha256()
    for options in published.variants:
        data = published.read(content, **options)
        for row in np.column_stack([data.x, data.y]):
            digest.update((" ".join(f"{value:.10g}" for value in row) + "\n").encode())
    return digest.hexdigest()


def _parsed(published: _Published, content: bytes, where: str, options: dict[str, Any]) -> Dataset:
    try:
        return published.read(content, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _sheet(content: bytes, sheet: str | int) -> pd.DataFrame:
    calamine = _optional("python_calamine", "a workbook")
    try:
        return pd.read_excel(io.BytesIO(content), sheet_name=sheet, header=None, engine="calamine")
    except (calamine.CalamineError, ValueError) as error:
        raise ValueError(f"not a workbook with sheet {sheet!r}: {error}") from error


def _dataset(table: pd.DataFrame, inputs: tuple[str, ...], targets: tuple[str, ...]) -> Dataset:
    """A table whose columns are the inputs and then the targets.

    Raises:
        ValueError: a wrong number of columns, no row, or a cell that is no finite number.
    """
    names = (*inputs, *targets)
    if table.shape[1] != len(names) or not len(table):
        raise ValueError(f"expected rows of {len(names)} columns, got a table {table.shape}")
    values = np.stack(
        [np.asarray(pd.to_numeric(table.iloc[:, j], errors="coerce"), np.float64) for j in range(len(names))],
        axis=1,
    )
    if not np.isfinite(values).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(
            f"column {names[column]!r}, row {row + 1}: expected a finite number, got {table.iloc[row, column]!r}"
        )
    x, y = values[:, : len(inputs)], values[:, len(inputs) :]
    return Dataset(x, y[:, 0] if len(targets) == 1 else y, inputs, targets)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise


def _optional(module: str, purpose: str) -> Any:
    """A package of the extra `data`.

    Raises:
        ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise ValueError(f"{purpose} needs the package {package}: pip install 'moejax[data]'") from error
