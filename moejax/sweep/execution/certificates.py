"""Certificates for a Dask cluster: an authority, and one certificate for each role, signed by it.

python -c 'from moejax.sweep.execution.certificates import make_certificates; make_certificates("certificates")'
"""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROLES = ("client", "scheduler", "worker")
SECURITY = 'ca-file = "ca.pem"\n' + "".join(
    f'\n[{role}]\ncert = "{role}.pem"\nkey = "{role}-key.pem"\n' for role in ROLES
)


def make_certificates(folder: str | Path, days: int = 365) -> Path:
    """Make a new folder with an authority, certificates, keys, and security.toml, which names them for `--security`.

    The authority is in ca.pem and ca-key.pem; each role (client, scheduler, worker) has ROLE.pem and ROLE-key.pem. Nobody
    but the owner can enter the folder. Whoever holds one of the keys may run code as each user whose schedulers,
    workers or sweeps trust this authority.

    Args:
        folder: the new folder; it must not exist yet.
        days: how long the certificates are valid.

    Returns:
        The path of security.toml.

    Raises:
        OSError: the folder exists, or cannot be made.
    """
    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = certificate("moejax-authority", authority_key, None, authority_key, days)
    _write(folder, "ca", authority, authority_key)
    for role in ROLES:
        key = ec.generate_private_key(ec.SECP256R1())
        _write(folder, role, certificate(f"moejax-{role}", key, authority, authority_key, days), key)
    (folder / ".gitignore").write_text("*\n")  # keys must not enter a repository
    file = folder / "security.toml"
    file.write_text(SECURITY)
    return file


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    authority_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """A certificate for a key, signed by the authority's key; without an authority it is self-signed."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of a cluster may differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    return builder.sign(authority_key, hashes.SHA256())


def _write(folder: Path, name: str, signed: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Write NAME.pem, and NAME-key.pem, which only its owner can read."""
    (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret = folder / f"{name}-key.pem"
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
