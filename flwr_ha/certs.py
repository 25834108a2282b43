"""Make a development certificate authority, and certificates for the addresses of a cluster."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flwr_ha.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Hold a certificate and its private key.

    Attributes
    ----------
    certificate : x509.Certificate
        The certificate.
    key : ec.EllipticCurvePrivateKey
        Its private key.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the private key as PEM, PKCS #8, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def make_authority(name: str, *, days: float = 825) -> Identity:
    """Return a new certificate authority that may sign certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    usage = _key_usage(is_authority=True)
    builder = (
        _builder(subject, subject, key, timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Identity(certificate=builder.sign(key, hashes.SHA384()), key=key)


def issue(
    authority: Identity, name: str, hosts: Sequence[str], *, days: float = 825, now: datetime | None = None
) -> Identity:
    """Return a certificate that servers and clients can use under the names and addresses of `hosts`.

    Parameters
    ----------
    authority : Identity
        Signs it.
    name : str
        Common name, for people.
    hosts : sequence of str
        DNS names and IP addresses.
    days : float
        How long it is good; negative: it has expired, for tests.
    now : datetime, optional
        When it was made; the present by default.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = (
        _builder(_name(name), authority.certificate.subject, key, timedelta(days=days), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority=False), critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(issuer_key, critical=False)
    )
    return Identity(certificate=builder.sign(authority.key, hashes.SHA384()), key=key)


def write_certificates(folder: Path, hosts: Sequence[str], *, days: float = 825) -> tuple[Path, ...]:
    """Write ``ca.crt``, ``ca.key``, ``server.crt``, ``server.key``; the authority is kept where it exists.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    hosts : sequence of str
        Names and addresses of all replicas; those of this machine are added.
    days : float
        How long the certificates are good.

    Returns
    -------
    tuple of Path
        The files that were written; keys have mode 600.

    Raises
    ------
    ConfigError
        The folder cannot be written, or what is there is no authority.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []
        if (folder / "ca.key").exists():
            authority = _load(folder / "ca.crt", folder / "ca.key")
        else:
            authority = make_authority("flwr-ha development CA", days=days)
            written += _write(folder, "ca", authority)
        server = issue(authority, "flwr-ha replica", [*hosts, *LOOPBACK], days=days)
        return (*written, *_write(folder, "server", server))
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be written: {error.strerror or error}") from error


def _write(folder: Path, stem: str, identity: Identity) -> list[Path]:
    certificate, key = folder / f"{stem}.crt", folder / f"{stem}.key"
    key.unlink(missing_ok=True)  # one that others may have open, or could read
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(identity.key_pem())
    certificate.write_bytes(identity.certificate_pem())
    return [certificate, key]


def _load(certificate: Path, key: Path) -> Identity:
    try:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("not a key of an elliptic curve")
        return Identity(certificate=x509.load_pem_x509_certificate(certificate.read_bytes()), key=loaded)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{str(certificate)!r} and its key are no authority of flwr-ha: {error}") from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    duration: timedelta,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    end = (now or datetime.now(UTC)) + duration
    start = min(now or datetime.now(UTC), end) - timedelta(hours=1)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
