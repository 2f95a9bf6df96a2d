"""Data sets by name: what is read, and one clear line for what cannot be."""

import dataclasses
import hashlib
import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from stock_workbook import STOCK, stock_file

from moejax.fitting import datasets
from moejax.fitting.datasets import STOCK_PERIODS, load

REAL_DATA = Path(os.environ.get("MOEJAX_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "Concrete_Data.xls").is_file(),
    reason=f"the raw files are not in {REAL_DATA}: set MOEJAX_DATA_DIR to a folder that has them",
)
AIRFOIL = "airfoil_self_noise.dat"


@pytest.fixture(autouse=True)
def no_folder_and_an_own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEJAX_UCI_ADDRESS", "http://127.0.0.1:9")  # nothing listens on the discard port


def test_diabetes_is_there():
    data = load("diabetes")
    assert data.x.shape == (442, 10)
    assert "bmi" in data.input_names


def test_cars_and_engel_come_with_packages():
    cars = load("cars")  # the first row is a Chevrolet Chevelle Malibu of 1970
    assert cars.x.shape == (392, 8)
    assert cars.x[0].tolist() == [8.0, 307.0, 130.0, 3504.0, 12.0, 1970.0, 0.0, 0.0]
    assert cars.y[0] == 18.0
    assert cars.x[:, 6:].sum(axis=0).tolist() == [68.0, 79.0]  # from Europe and from Japan
    engel = load("engel")
    assert engel.x.shape == (235, 1)
    assert (round(engel.x[0, 0], 2), round(engel.y[0], 2)) == (420.16, 255.84)


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"dataset: unknown name 'iris'; known: airfoil, .*diabetes"):
        load("iris")


def airfoil_file(rows):
    return "".join("\t".join(f"{value:g}" for value in row) + "\r\n" for row in rows).encode()


@pytest.fixture
def airfoil_rows():
    return np.random.default_rng(0).uniform(1, 100, size=(9, 6)).round(2)


@pytest.fixture
def stock_cells():
    rng = np.random.default_rng(1)
    return {period: rng.uniform(size=(7, 18)).round(4) for period in STOCK_PERIODS}


def test_airfoil_from_a_folder(tmp_path, airfoil_rows, monkeypatch):
    (tmp_path / AIRFOIL).write_bytes(airfoil_file(airfoil_rows))
    for data in (load("airfoil", tmp_path), load("airfoil", str(tmp_path))):
        np.testing.assert_array_equal(data.x, airfoil_rows[:, :5])
        np.testing.assert_array_equal(data.y, airfoil_rows[:, 5])
        assert data.target_name == "sound_pressure_db"
        assert len(data.input_names) == 5
        assert "not byte for byte the published file" in data.source
    monkeypatch.setenv("MOEJAX_DATA_DIR", str(tmp_path))
    np.testing.assert_array_equal(load("airfoil").x, airfoil_rows[:, :5])
    other = tmp_path / "other"
    other.mkdir()
    (other / AIRFOIL).write_bytes(airfoil_file(airfoil_rows[:4]))
    assert len(load("airfoil", other).y) == 4  # the argument comes before the variable


@pytest.mark.parametrize("name", [STOCK, "stock_portfolio_performance.xlsx"])
def test_stock_portfolio_has_six_targets_in_five_periods(tmp_path, stock_cells, name):
    (tmp_path / name).write_bytes(stock_file(stock_cells))
    data = load("stock_portfolio", tmp_path)
    np.testing.assert_array_equal(data.x, stock_cells["all period"][:, :6])
    np.testing.assert_array_equal(data.y, stock_cells["all period"][:, 6:12])
    assert len(data.target_names) == 6
    one = load("stock_portfolio", tmp_path, target="total_risk", period="3rd period", normalised=True)
    np.testing.assert_array_equal(one.y, stock_cells["3rd period"][:, 15])
    np.testing.assert_array_equal(one.x, stock_cells["3rd period"][:, :6])
    assert one.target_names == ("total_risk",)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("air foil", {}, ["dataset", "'air foil'", "did you mean airfoil"]),
        ("airfoil", {"target": "noise"}, ["target", "'noise'", "sound_pressure_db"]),
        ("stock_portfolio", {"target": "annual_retrun"}, ["target", "did you mean annual_return"]),
        ("stock_portfolio", {"period": "5th period"}, ["period", "4th period", "'5th period'"]),
        ("airfoil", {"period": "all period"}, ["period", "no option", "'airfoil'"]),
        ("concrete", {}, ["data_dir", "Concrete_Data.xls", "'concrete'"]),
        ("airfoil", {"data_dir": "nowhere"}, ["data_dir", "expected a folder", "'nowhere'"]),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path, airfoil_rows, stock_cells, name, options, words):
    (tmp_path / AIRFOIL).write_bytes(airfoil_file(airfoil_rows))
    (tmp_path / STOCK).write_bytes(stock_file(stock_cells))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        load(name, **({"data_dir": tmp_path} | options))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("airfoil", AIRFOIL, b"1\t2\t3\r\n", ["6 columns", "(1, 3)"]),
        ("airfoil", AIRFOIL, b"1\t2\t3\t4\t5\tloud\r\n", ["sound_pressure_db", "row 1", "'loud'"]),
        ("airfoil", AIRFOIL, b"", ["No columns"]),
        ("concrete", "Concrete_Data.xls", b"no workbook at all", ["not a workbook"]),
        ("stock_portfolio", STOCK, b"PK no workbook at all", ["not a workbook"]),
    ],
)
def test_a_file_in_another_format(tmp_path, name, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        load(name, tmp_path)
    for word in [str(tmp_path / file), *words]:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def server(monkeypatch):
    """A server on loopback in UCI's place: `server.answers[path]` is (status, body, declared length)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests.append(self.path)
            status, body, length = served.answers.get(self.path, (404, b"no such file", None))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.answers, served.requests = {}, []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("MOEJAX_UCI_ADDRESS", f"http://127.0.0.1:{served.server_port}/public")
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def zipped(name, content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("readme.txt", "not the data")
        members.writestr(name, content)
    return archive.getvalue()


def publish(monkeypatch, name, content):
    """Make `content` the known file of a data set."""
    changed = dataclasses.replace(datasets._PUBLISHED[name], sha256=hashlib.sha256(content).hexdigest())
    if changed.numbers_sha256 is not None:
        changed = dataclasses.replace(changed, numbers_sha256=datasets._digest_of_numbers(changed, content))
    monkeypatch.setitem(datasets._PUBLISHED, name, changed)


AIRFOIL_PATH = "/public/291/airfoil+self+noise.zip"
STOCK_PATH = "/public/390/stock+portfolio+performance.zip"


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_download_is_checked_and_kept(server, monkeypatch, tmp_path, airfoil_rows):
    content = airfoil_file(airfoil_rows)
    publish(monkeypatch, "airfoil", content)
    server.answers[AIRFOIL_PATH] = (200, zipped(f"folder/{AIRFOIL}", content), None)
    data = load("airfoil")
    np.testing.assert_array_equal(data.x, airfoil_rows[:, :5])
    assert data.source.endswith(f"{AIRFOIL_PATH}, checked")
    assert kept(tmp_path) == [AIRFOIL]
    again = load("airfoil")
    np.testing.assert_array_equal(again.y, airfoil_rows[:, 5])
    assert server.requests == [AIRFOIL_PATH]  # the second time it came from the cache
    # a damaged file in the cache is fetched again
    (tmp_path / "cache" / "datasets" / AIRFOIL).write_bytes(content[:-3])
    np.testing.assert_array_equal(load("airfoil").y, airfoil_rows[:, 5])
    assert len(server.requests) == 2
    assert (tmp_path / "cache" / "datasets" / AIRFOIL).read_bytes() == content
    # a folder that lacks the file is passed over where only the variable names it
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MOEJAX_DATA_DIR", str(tmp_path / "empty"))
    assert "downloaded before" in load("airfoil").source
    # no cache: nothing is kept
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    load("airfoil")
    assert len(server.requests) == 3


def test_a_workbook_saved_again_is_known_by_its_numbers(server, monkeypatch, tmp_path, stock_cells):
    publish(monkeypatch, "stock_portfolio", stock_file(stock_cells))
    saved_again = openpyxl.load_workbook(io.BytesIO(stock_file(stock_cells)))
    saved_again.properties.title = "saved again"
    content = io.BytesIO()
    saved_again.save(content)
    server.answers[STOCK_PATH] = (200, zipped(STOCK, content.getvalue()), None)
    assert load("stock_portfolio", target="excess_return").y.shape == (7,)
    assert kept(tmp_path) == ["stock_portfolio_performance.xlsx"]
    (tmp_path / "cache" / "datasets" / "stock_portfolio_performance.xlsx").unlink()
    # one other number in one sheet that the default does not read
    stock_cells["2nd period"][3, 8] += 1e-4
    server.answers[STOCK_PATH] = (200, zipped(STOCK, stock_file(stock_cells)), None)
    with pytest.raises(ValueError, match="wrong content"):
        load("stock_portfolio")
    assert kept(tmp_path) == []


def test_failed_downloads_are_one_line_and_keep_nothing(server, monkeypatch, tmp_path, airfoil_rows):
    content = airfoil_file(airfoil_rows)
    archive = zipped(AIRFOIL, content)
    publish(monkeypatch, "airfoil", content)
    damaged = bytearray(archive)
    damaged[archive.index(b"airfoil_self_noise.dat") + 40] ^= 0xFF
    for answer, error, words in [
        ((404, b"gone", None), OSError, ["answered 404", "MOEJAX_DATA_DIR", "--data-dir"]),
        ((500, b"", None), OSError, ["answered 500"]),
        ((200, archive[:100], len(archive)), OSError, ["no complete answer", "MOEJAX_DATA_DIR"]),
        ((200, b"<html>sign in</html>", None), ValueError, ["not a zip archive"]),
        ((200, bytes(damaged), None), ValueError, ["not a zip archive"]),
        ((200, zipped("other.dat", content), None), ValueError, [AIRFOIL, "readme.txt, other.dat"]),
        (
            (200, zipped(AIRFOIL, content[:-2]), None),
            ValueError,
            [hashlib.sha256(content).hexdigest(), "wrong content"],
        ),
    ]:
        server.answers[AIRFOIL_PATH] = answer
        with pytest.raises(error) as caught:
            load("airfoil")
        for word in ["'airfoil'", AIRFOIL_PATH, *words]:
            assert word in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
        assert kept(tmp_path) == []


def test_no_network_and_no_folder_names_both_ways(tmp_path):
    with pytest.raises(
        OSError, match=r"connect to the network, or put .*MOEJAX_DATA_DIR or --data-dir"
    ) as caught:
        load("concrete")
    assert "\n" not in str(caught.value)
    assert "Concrete_Data.xls" in str(caught.value)
    assert kept(tmp_path) == []


@pytest.mark.parametrize(("missing", "name"), [("pooch", "airfoil"), ("python_calamine", "stock_portfolio")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, stock_cells, missing, name):
    (tmp_path / STOCK).write_bytes(stock_file(stock_cells))
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ValueError, match=r"pip install 'moejax\[data\]'"):
        load(name, tmp_path if name == "stock_portfolio" else None)


@needs_real_data
def test_the_real_files():
    airfoil, concrete, stock = (load(name, REAL_DATA) for name in ("airfoil", "concrete", "stock_portfolio"))
    for data in (airfoil, concrete, stock):
        assert data.source.endswith(", the published file")
    # counts and ranges as UCI's pages give them
    assert airfoil.x.shape == (1503, 5)
    assert (airfoil.x[:, 0].min(), airfoil.x[:, 0].max()) == (200, 20000)
    assert airfoil.y[0] == 126.201
    assert concrete.x.shape == (1030, 8)
    assert len(np.unique(np.column_stack([concrete.x, concrete.y]), axis=0)) == 1030 - 25
    np.testing.assert_allclose([concrete.y.min(), concrete.y.max()], [2.33, 82.6], atol=5e-3)
    assert (concrete.x[:, 7].min(), concrete.x[:, 7].max()) == (1, 365)
    assert stock.x.shape == (63, 6)
    assert stock.y.shape == (63, 6)
    np.testing.assert_allclose(stock.x.sum(axis=1), 1.0, atol=2.1e-3)  # printed to three digits
    for period in STOCK_PERIODS:
        raw = load("stock_portfolio", REAL_DATA, period=period)
        scaled = load("stock_portfolio", REAL_DATA, period=period, normalised=True)
        np.testing.assert_array_equal(raw.x, scaled.x)
        np.testing.assert_allclose(
            [scaled.y.min(axis=0), scaled.y.max(axis=0)], [[0.2] * 6, [0.8] * 6], atol=1e-6
        )
        for j in range(6):
            assert abs(np.corrcoef(raw.y[:, j], scaled.y[:, j])[0, 1]) > 0.999
