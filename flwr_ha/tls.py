"""TLS contexts from the settings, the end of a connection, and what a failed handshake means for people."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from flwr_ha.errors import ConfigError
from flwr_ha.settings import TlsSettings

_MEANINGS = {
    "certificate has expired": "its certificate has expired",
    "certificate is not yet valid": "its certificate is not valid yet: compare the clocks",
    "mismatch": "its certificate is not for this name or address",
    "not valid for": "its certificate is not for this name or address",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by the ca of the settings",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "RECORD_LAYER_FAILURE": "it does not speak TLS",
    "UNKNOWN_CA": "it does not trust the ca of our certificate",
    "CERTIFICATE_REQUIRED": "it asks for a client certificate",
    "without sending a response": "it closed the connection: it may speak TLS where the settings name no certificates",
}


def client_context(ca: Path | None, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return a context that trusts one authority only and checks names.

    Parameters
    ----------
    ca : Path or None
        PEM file of the authority; None: those of the system.
    cert, key : Path or None
        Own certificate for peers that ask for it.

    Raises
    ------
    ConfigError
        A file is not PEM, or the key does not belong to the certificate; the message names it.
    """
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ca = {str(ca)!r} holds no certificate in PEM form: {error}") from error
    if cert is not None and key is not None:
        _load_chain(context, cert, key)
    return context


def peer_context(tls: TlsSettings) -> ssl.SSLContext | None:
    """Return the context for the API of other replicas; None where it is plain HTTP."""
    return client_context(tls.ca) if tls.is_on else None


def check_server_files(tls: TlsSettings) -> None:
    """Check the files that a replica serves with, before anything starts.

    Raises
    ------
    ConfigError
        The certificate has expired, is not PEM, or the key is another one's or can be read by others.
    """
    if tls.cert is None or tls.key is None:
        return
    client_context(tls.ca)
    _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls.cert, tls.key)
    if tls.key.stat().st_mode & 0o077:
        raise ConfigError(f"tls.key = {str(tls.key)!r} can be read by others: chmod 600 it")
    from cryptography import x509

    end = x509.load_pem_x509_certificate(tls.cert.read_bytes()).not_valid_after_utc
    if end < datetime.now(UTC):
        raise ConfigError(f"tls.cert = {str(tls.cert)!r} expired on {end:%Y-%m-%d}: have it renewed")


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask at the terminal
    except (OSError, ssl.SSLError, ValueError) as error:
        what = "does not belong to" if "KEY_VALUES_MISMATCH" in str(error) else "cannot be used with"
        raise ConfigError(f"the key {str(key)!r} {what} the certificate {str(cert)!r}: {error}") from error


def hang_up(connection: socket.socket) -> None:
    """End a connection from any thread; one that waits for it wakes up, and closes it."""
    with suppress(OSError):  # closed already
        # The method of a TLS socket would make it a plain one first: its reader would take ciphertext for an answer.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def explain(error: BaseException) -> str:
    """Return what a failed connection means, in words; else the error's own text."""
    text = f"{error!r} {error}"
    return next((meaning for sign, meaning in _MEANINGS.items() if sign in text), str(error) or type(error).__name__)
