"""The certificates of a cluster: where they come from, and what is said of bad ones."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from test_sweep_run import fake, sweep  # noqa: F401 - a fixture

from moejax.cli import program as cli
from moejax.sweep.execution.certificates import make_certificates
from moejax.sweep.execution.dask_cluster import joined_executor
from moejax.sweep.execution.executors import ClusterError, InProcessExecutor
from moejax.sweep.execution.location import Place
from moejax.sweep.execution.security import (
    ROLES,
    cluster_security,
    private_scratch_folder,
    read_security_file,
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A folder of certificates; one of another authority lies beside it, as `other`, and one that has expired in it."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("cluster", "other"):
        make_certificates(folder / name)
    make_certificates(folder / "cluster" / "old", days=0)
    return folder / "cluster"


def test_joining_without_tls_is_one_warning(fake, tmp_path, monkeypatch, capsys, certificates):  # noqa: F811
    monkeypatch.setattr(
        "moejax.sweep.execution.dask_cluster.cluster_executor", lambda *_: InProcessExecutor()
    )
    small = ("trials=2", "noise_std=0.1")
    sweep(fake, tmp_path / "run", *small, workers=None, cluster="tcp://[::1]:1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "warning: --cluster tcp://[::1]:1 is joined without TLS: whoever reaches it can run"
    )
    security = certificates / "security.toml"
    sweep(fake, tmp_path / "run", *small, "seed=1", workers=None, cluster="tls://x:1", security=security)
    assert capsys.readouterr().err == ""


def test_certificates_come_from_dasks_own_configuration(certificates):
    from dask import config

    assert cluster_security("tcp://x:1", None) is None
    assert cluster_security("slurm:x.toml", None) is None
    with pytest.raises(
        ValueError, match=r"--cluster tls://x:1: expected certificates for TLS: give --security FILE"
    ):
        cluster_security("tls://x:1", None)
    tls = "distributed.comm.tls"
    files = {f"{tls}.ca-file": str(certificates / "ca.pem")}
    for role in ROLES:
        files |= {f"{tls}.{role}.cert": str(certificates / f"{role}.pem")}
        files |= {f"{tls}.{role}.key": str(certificates / f"{role}-key.pem")}
    with config.set(files):
        assert cluster_security("tls://x:1", None).tls_client_cert == files[f"{tls}.client.cert"]
        assert cluster_security("slurm:x.toml", None).tls_worker_key == files[f"{tls}.worker.key"]
    with (
        config.set(files | {f"{tls}.ca-file": "nowhere.pem"}),
        pytest.raises(
            ValueError, match=r"distributed.comm.tls: ca-file: nowhere.pem cannot be read: No such file"
        ),
    ):
        cluster_security("tls://x:1", None)


GOOD = 'ca-file = "ca.pem"\n[client]\ncert = "client.pem"\nkey = "client-key.pem"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read: No such file or directory"),
        ("ca-file = ", r"not valid TOML"),
        ("a = " + "[" * 100_000, r"not valid TOML"),
        (GOOD.replace("ca-file", "ca_file"), r"ca_file: unknown key; did you mean ca-file\?"),
        (GOOD.replace("key =", "kye ="), r"client: kye: unknown key; did you mean key\?"),
        ("[client]\ncert = 'client.pem'", r"ca-file: expected the path of a file in PEM format, got nothing"),
        (GOOD.replace('"ca.pem"', "3"), r"ca-file: expected the path of a file in PEM format, got 3"),
        ("ca-file = 'ca.pem'", r"client: expected a table, \[client\], with cert and key, got nothing"),
        ("client = 1\nca-file = 'ca.pem'", r"client: expected a table, \[client\], with cert and key, got 1"),
        (GOOD.replace("client-key.pem", "none.pem"), r"client.key: .*none.pem cannot be read: No such file"),
        (GOOD.replace("ca.pem", "."), r"ca-file: .* cannot be read: Is a directory"),
        (GOOD.replace('"ca.pem"', r'"\u0000"'), r"ca-file: .* cannot be read: embedded null byte"),
        (GOOD.replace("ca.pem", "security.toml"), r"ca-file: .* holds no certificate in PEM format"),
        (
            GOOD.replace("client-key", "worker-key"),
            r"client: .* are not a certificate and its key .*(?i:mismatch)",
        ),
        (
            GOOD.replace("client-key", "encrypted"),
            r"client.key: .* is encrypted: expected a key without a pass",
        ),
        (GOOD.replace("ca.pem", "../other/ca.pem"), r"client.cert: .* is refused with ca-file: "),
        (GOOD.replace(' "', ' "old/'), r"client.cert: .* is refused with ca-file: .*expired"),
    ],
)
def test_a_bad_security_file_is_one_line(certificates, tmp_path, monkeypatch, capsys, text, message):
    encrypt_the_clients_key(certificates)
    file = certificates / "bad.toml"
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_text(text)
    (tmp_path / "spec.toml").write_text('name = "x"\nmethods = ["spectral"]\ntrials = 1\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["sweep", "spec.toml", "--dry-run", "--cluster", "tls://127.0.0.1:1", "--security", str(file)]
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(error.splitlines()) == 1
    assert len(error) < 1000
    assert re.search(message, error)
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def encrypt_the_clients_key(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((folder / "client-key.pem").read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    (folder / "encrypted.pem").write_bytes(key.private_bytes(*form))


def test_security_goes_with_a_cluster_that_has_tls(certificates):
    file = certificates / "security.toml"
    with pytest.raises(ValueError, match=r"--security .*security.toml: goes with --cluster"):
        Place(2, None, file).prepare()
    with pytest.raises(ValueError, match=r"--cluster tcp://x:1: expected tls://HOST:PORT with --security"):
        Place(None, "tcp://x:1", file).prepare()


def test_the_file_names_every_role_that_slurm_needs(certificates):
    file = certificates / "security.toml"
    security = read_security_file(file, ROLES)
    assert security.require_encryption
    assert security.tls_scheduler_key == str(certificates / "scheduler-key.pem")
    assert {stat.S_IMODE((certificates / f"{role}-key.pem").stat().st_mode) for role in ROLES} == {0o600}
    assert stat.S_IMODE(certificates.stat().st_mode) == 0o700
    assert (certificates / ".gitignore").read_text() == "*\n"
    short = certificates / "short.toml"
    short.write_text(GOOD)
    assert read_security_file(short, ("client",)).tls_client_key == str(certificates / "client-key.pem")
    with pytest.raises(ValueError, match=r"scheduler: expected a table, \[scheduler\]"):
        read_security_file(short, ROLES)


def test_the_scratch_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"moejax-{os.getuid()}"
    assert private_scratch_folder() == str(usual) == private_scratch_folder()
    assert stat.S_IMODE(usual.stat().st_mode) == 0o700
    usual.chmod(0o777)  # as another user could have made it
    other = Path(private_scratch_folder())
    assert other != usual
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    usual.rename(tmp_path / "moved")
    (tmp_path / "moved").chmod(0o700)
    usual.symlink_to(tmp_path / "moved")
    assert Path(private_scratch_folder()) not in (usual, other)


def test_an_address_of_a_scheduler_with_other_certificates_is_one_line(certificates, monkeypatch):
    from distributed import Scheduler, SpecCluster

    security = read_security_file(certificates / "security.toml", ROLES)
    options = {
        "host": "127.0.0.1",
        "port": 0,
        "protocol": "tls://",
        "security": security,
        "dashboard_address": ":0",
    }
    with SpecCluster(
        scheduler={"cls": Scheduler, "options": options}, security=security, silence_logs=False
    ) as cluster:
        address = cluster.scheduler_address
        other = read_security_file(certificates.parent / "other" / "security.toml", ("client",))
        with pytest.raises(
            ClusterError, match=r"no Dask scheduler answers there with these certificates: .*TLS"
        ):
            joined_executor(address, other)
        executor = joined_executor(address, security)
        assert executor.workers() == []
        executor.close()
