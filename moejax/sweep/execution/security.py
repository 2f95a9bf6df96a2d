"""Access to a cluster: certificates for mutual TLS, and a private scratch folder.

Dask's scheduler, nannies and workers run every function that they are sent. Anyone who can connect to one of them could
run code as the user of the sweep. So each of them accepts only connections whose other end has a certificate signed by
the cluster's own authority.

The file of `--security` has the keys of Dask's own setting `distributed.comm.tls`; paths are relative to the file:

ca-file = "ca.pem"
[client]                         # this program, which hands out the chunks
cert = "client.pem"
key = "client-key.pem"           # if left out, the key is in the file of the certificate
[scheduler]                      # only for slurm:, where this program starts the scheduler, and Slurm the workers
cert = "scheduler.pem"
key = "scheduler-key.pem"
[worker]
cert = "worker.pem"
key = "worker-key.pem"
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.registry import nearest
from moejax.sweep.spec.fields import show

if TYPE_CHECKING:
    from distributed import Security

ROLES = ("client", "scheduler", "worker")
ENCRYPTED_SCHEMES = ("tls", "wss")
DASK_SETTING = "distributed.comm.tls"
HANDSHAKE_ROUNDS = 10
"""More rounds than any version of TLS needs."""


def cluster_security(cluster: str, file: Path | None) -> Security | None:
    """The certificates for `--cluster`: from `--security FILE`, else from Dask's own configuration.

    Args:
        cluster: an address, or slurm:FILE.toml.
        file: the file of `--security`.

    Returns:
        None if there are none: a scheduler at an address is then joined without TLS, and one that is started for
        Slurm gets temporary certificates.

    Raises:
        ValueError: one line that names the file and the key at fault.
    """
    slurm = cluster.startswith("slurm:")
    scheme = cluster.partition("://")[0]
    roles = ROLES if slurm else ("client",)
    if file is not None:
        if not slurm and scheme not in ENCRYPTED_SCHEMES:
            raise ValueError(
                f"--cluster {cluster}: expected tls://HOST:PORT with --security {file}, got an address without TLS"
            )
        return read_security_file(file, roles)
    if slurm or scheme in ENCRYPTED_SCHEMES:
        configured = _configured_security(roles)
        if configured is None and not slurm:
            raise ValueError(
                f"--cluster {cluster}: expected certificates for TLS: give --security FILE, or set {DASK_SETTING} "
                "in Dask's configuration"
            )
        return configured
    return None


def unencrypted_warning(cluster: str) -> str | None:
    """A warning to print if a scheduler at this address is joined without TLS; None with TLS, and for Slurm."""
    if cluster.startswith("slurm:") or cluster.partition("://")[0] in ENCRYPTED_SCHEMES:
        return None
    return (
        f"warning: --cluster {cluster} is joined without TLS: whoever reaches it can run code as you, here and on "
        "its workers; docs/security.md says how to give it certificates"
    )


def read_security_file(path: Path, roles: tuple[str, ...]) -> Security:
    """Read the file of `--security`, and check that its certificates fit together.

    Raises:
        ValueError: one line with the file, the key, and the accepted values.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--security {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--security {path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"--security {path}: not valid TOML: nested too deep") from None
    where = f"--security {path}"
    _check_keys(where, content, ("ca-file", *ROLES))
    fields = {"tls_ca_file": _path_in(path, where, "ca-file", content.get("ca-file"))}
    for role in roles:
        table = content.get(role)
        if not isinstance(table, dict):
            raise ValueError(
                f"{where}: {role}: expected a table, [{role}], with cert and key, got {_got(table)}"
            )
        _check_keys(f"{where}: {role}", table, ("cert", "key"))
        cert = _path_in(path, where, f"{role}.cert", table.get("cert"))
        key = _path_in(path, where, f"{role}.key", table["key"]) if "key" in table else cert
        fields |= {f"tls_{role}_cert": cert, f"tls_{role}_key": key}
    return _checked_security(where, roles, fields)


def temporary_security() -> Security:
    """Certificates for one run; Dask holds them in memory, and in a private temporary folder while OpenSSL reads them."""
    from distributed import Security

    return Security.temporary()


@contextlib.contextmanager
def temporary_security_in(folder: Path) -> Iterator[Security]:
    """Certificates for one run in files that Slurm's jobs can read, in a folder that no other user can enter.

    Raises:
        OSError: the folder cannot be written.
    """
    from moejax.sweep.execution.certificates import make_certificates

    with tempfile.TemporaryDirectory(prefix=".moejax-tls-", dir=folder) as private:
        yield read_security_file(make_certificates(Path(private, "certificates")), ROLES)


def private_scratch_folder() -> str:
    """A folder for Dask's scratch files in which no other user can write.

    Dask's servers put their scratch folder first in the path of imports. By default it is a folder that the first
    user of the machine makes, with the same name for all users.
    """
    from dask import config as dask_config

    base = dask_config.get("temporary-directory", None) or tempfile.gettempdir()
    if not hasattr(os, "getuid"):
        return tempfile.mkdtemp(prefix="moejax-", dir=base)
    folder = os.path.join(base, f"moejax-{os.getuid()}")
    os.makedirs(base, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, mode=0o700)
    found = os.lstat(folder)
    if (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    ):
        return folder
    return tempfile.mkdtemp(prefix="moejax-", dir=base)


def _configured_security(roles: tuple[str, ...]) -> Security | None:
    """The certificates that Dask's own configuration names; None if it lacks the authority or one of the roles."""
    import distributed  # noqa: F401 - the import sets the defaults of these settings
    from dask import config as dask_config

    fields = {"tls_ca_file": dask_config.get(f"{DASK_SETTING}.ca-file")}
    for role in roles:
        cert = dask_config.get(f"{DASK_SETTING}.{role}.cert")
        fields |= {
            f"tls_{role}_cert": cert,
            f"tls_{role}_key": dask_config.get(f"{DASK_SETTING}.{role}.key") or cert,
        }
    if not all(fields.values()):
        return None
    return _checked_security(f"Dask's configuration, {DASK_SETTING}", roles, fields)


def _checked_security(where: str, roles: tuple[str, ...], fields: dict[str, Any]) -> Security:
    """A `Security` whose files are readable, belong together, are valid today, and are signed by the authority.

    A handshake between two ends in this process finds errors that another machine would later refuse without a reason.
    """
    from distributed import Security

    for name, path in fields.items():
        key = "ca-file" if name == "tls_ca_file" else name.removeprefix("tls_").replace("_", ".")
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: {key}: {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {show(path)} cannot be read: {error}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=fields["tls_ca_file"])
    except ssl.SSLError as error:
        reason = error.reason or error
        raise ValueError(
            f"{where}: ca-file: {fields['tls_ca_file']} holds no certificate in PEM format ({reason})"
        ) from None
    for role in roles:
        cert, key = fields[f"tls_{role}_cert"], fields[f"tls_{role}_key"]
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=_no_pass_phrase)
        except _PassPhraseError:
            raise ValueError(
                f"{where}: {role}.key: {key} is encrypted: expected a key without a pass phrase"
            ) from None
        except ssl.SSLError as error:
            reason = error.reason or error
            raise ValueError(
                f"{where}: {role}: {cert} and {key} are not a certificate and its key in PEM format ({reason})"
            ) from None
    role = ""
    try:
        security = Security(require_encryption=True, **fields)
        for role in roles:
            _try_handshake(security, role)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(
            f"{where}: {role}.cert: {fields[f'tls_{role}_cert']} is refused with ca-file: {error.verify_message}"
        ) from None
    except (
        ssl.SSLError,
        ValueError,
    ) as error:  # ciphers and versions, which the user's Dask configuration may set
        raise ValueError(f"{where}: no TLS with these settings: {error}") from None
    return security


def _try_handshake(security: Security, role: str) -> None:
    """Make a TLS handshake between two ends in memory; a client's certificate is used only at the end that connects.

    Raises:
        ssl.SSLError: a certificate is refused.
    """
    listening = security.get_listen_args(role)["ssl_context"]
    connecting = security.get_connection_args(role)["ssl_context"]
    if role == "client":
        connecting.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        connecting.wrap_bio(to_client, to_server),
        listening.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(HANDSHAKE_ROUNDS):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue  # the other end sends next
            ends.remove(end)
        if not ends:
            return
    raise ssl.SSLError("the handshake did not end")


class _PassPhraseError(ValueError):
    """OpenSSL asked for a pass phrase."""


def _no_pass_phrase() -> str:
    raise _PassPhraseError


def _check_keys(where: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: {key}: unknown key; {nearest(key, known)}")


def _path_in(file: Path, where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key}: expected the path of a file in PEM format, got {_got(value)}")
    return str(file.parent.absolute() / os.path.expanduser(value))


def _got(value: Any) -> str:
    return "nothing" if value is None else show(value)
