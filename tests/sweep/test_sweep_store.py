"""The store: each failure of a folder is one clear line, and nothing committed is lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
from pathlib import Path

import pytest
from stores import made_up_store

from moejax.environment import git_state
from moejax.sweep.execution.provenance import collect_provenance
from moejax.sweep.store import schema
from moejax.sweep.store.lock import is_running
from moejax.sweep.store.read import load
from moejax.sweep.store.schema import StoreError
from moejax.sweep.store.store import Store


def tear(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 600)


def one_line(caught: pytest.ExceptionInfo[StoreError], *words: str) -> None:
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_new_store_is_wal_and_synchronous(tmp_path):
    with Store(tmp_path / "a" / "run") as store:
        assert store.journal_mode == "wal"
        assert store._connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert is_running(tmp_path / "a" / "run")
    assert not is_running(tmp_path / "a" / "run")


def test_two_coordinators_on_one_folder(tmp_path):
    with Store(tmp_path):
        with pytest.raises(StoreError) as caught:
            Store(tmp_path)
        one_line(caught, "already running here", f"process {os.getpid()}")
    with Store(tmp_path):
        pass


@pytest.mark.parametrize("offset", [0, 4096])
def test_a_damaged_store_is_not_touched(tmp_path, offset):
    with Store(tmp_path):
        pass
    path = tmp_path / schema.STORE_NAME
    tear(path, offset)
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    one_line(caught, "damaged", "move it away")
    assert path.read_bytes() == before


def test_a_newer_version_is_refused(tmp_path):
    with Store(tmp_path) as store:
        store._connection.execute("PRAGMA user_version=99")
    for open_it in (Store, load):
        with pytest.raises(StoreError) as caught:
            open_it(tmp_path)
        one_line(caught, "newer moejax", "version 99", "upgrade")


def test_another_sqlite_file_is_refused(tmp_path):
    path = tmp_path / schema.STORE_NAME
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE a (b)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    one_line(caught, "not a store of moejax")
    assert path.read_bytes() == before


def test_no_store_there(tmp_path):
    with pytest.raises(StoreError, match="no such store"):
        load(tmp_path / "nothing")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "file" / "run")
    one_line(caught, "cannot make the run folder")


@pytest.fixture
def unprivileged():
    """A folder of another user, seen without root's rights."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    yield folder, lambda: os.seteuid(65534) if root else folder.chmod(0o555)
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("used", [False, True])
def test_a_read_only_folder(unprivileged, used):
    folder, give_up_rights = unprivileged
    if used:
        with Store(folder):
            pass
        for path in folder.iterdir():
            path.chmod(0o444)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    give_up_rights()
    with pytest.raises(StoreError) as caught:
        Store(folder)
    one_line(caught, "cannot be written", "--out")
    if used:
        assert load(folder).empty  # reading needs no right to write
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_wal_on_a_network_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "on_network_file_system", lambda path: True)
    with Store(tmp_path) as store:
        assert store.journal_mode == "delete"


def test_the_table_of_mounts_tells_a_network_file_system(tmp_path, monkeypatch):
    table = f"/dev/a / ext4 rw 0 0\nserver:/b {tmp_path} nfs4 rw 0 0\n/dev/c {tmp_path}/local ext4 rw 0 0\n"
    monkeypatch.setattr(schema.Path, "read_text", lambda *_, **__: table)
    assert schema.on_network_file_system(tmp_path / "run" / "store.sqlite")
    assert not schema.on_network_file_system(tmp_path / "local" / "store.sqlite")
    assert not schema.on_network_file_system(Path("/somewhere/store.sqlite"))


def test_falls_back_where_wal_is_impossible(tmp_path, monkeypatch):
    """SQLite's dot-file locking has no shared memory, like some network file systems."""

    def open_without_shared_memory(path: Path) -> sqlite3.Connection:
        uri = f"file:{path}?vfs=unix-dotfile"
        return sqlite3.connect(uri, uri=True, isolation_level=None)

    monkeypatch.setattr(schema, "_open", open_without_shared_memory)
    with Store(tmp_path) as store:
        assert store.journal_mode == "delete"


def test_a_kill_while_the_tables_are_made_leaves_a_usable_folder(tmp_path):
    (tmp_path / schema.STORE_NAME).write_bytes(b"")
    previous = []
    with Store(tmp_path, previous.append):
        assert previous == [[]]


def test_a_checkout_is_dirty_by_its_sources_not_by_its_results(tmp_path):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    for name in ("package/code.py", "results/table.csv", "sweeps/one.toml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n")
    assert git_state(tmp_path / "package") is None
    git("init")
    git("add", "-A")
    git("commit", "-m", "all")
    clean = git_state(tmp_path / "package")
    assert clean is not None
    assert not clean["dirty"]
    (tmp_path / "results" / "table.csv").write_text("2\n")
    assert git_state(tmp_path / "package") == clean
    (tmp_path / "sweeps" / "one.toml").write_text("2\n")
    assert git_state(tmp_path / "package") == clean | {"dirty": True}


def test_a_commit_of_a_repository_that_does_not_track_the_folder_is_not_recorded(tmp_path, monkeypatch):
    """A user's own repository around the .venv that holds the package, or one that a git hook names in the environment."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / ".venv" / "lib" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("1\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "the user's own")
    assert git_state(package) is None
    (tmp_path / "own.py").write_text("1\n")
    git("add", "-A")
    git("commit", "-m", "more")
    assert git_state(tmp_path) is not None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "own.py").write_text("1\n")
    assert git_state(elsewhere) is None


def test_the_text_of_the_spec_is_the_one_that_was_read(tmp_path):
    toml, _, plan = made_up_store(tmp_path)
    text = toml.read_text()
    toml.unlink()  # as a pipe has nothing left
    assert collect_provenance(plan, (), "nobody")["spec_text"] == text
