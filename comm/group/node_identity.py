"""Who this machine is in a group: a private key, and the self-signed certificate that other nodes pin.

    <directory>/node.pem    private key and certificate in PEM; mode 0600

Both are made at first use and stay: a node that restarts is the node that was paired. Nobody looks at the names and
dates in a certificate. It is compared as bytes, and it is valid always, since small machines start in 1970.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
import secrets
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from .. import key_files
from ..errors import KeyFileError

MAX_CERTIFICATE_BYTES = 2048
NODE_NAME_CHARACTERS = 64
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s[^-]+-----END CERTIFICATE-----")


@dataclass(frozen=True)
class NodeIdentity:
    """This machine. `certificate` is DER; the private key stays in `file`, where `ssl` reads it."""

    name: str
    certificate: bytes
    file: Path

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)

    @classmethod
    def of(cls, directory: Path, name: str = "") -> NodeIdentity:
        """The identity kept in `directory`, made at the first call; `name` is the host's by default.

        KeyFileError when the file cannot be used. It is never replaced: other nodes know this one by it.
        """
        file = directory / "node.pem"
        if not file.exists():
            # Unlike a rename, a link fails when another process was first; then that process's key counts.
            with key_files.written(directory, _made()) as fresh, contextlib.suppress(FileExistsError):
                file.hardlink_to(fresh)
        found = _CERTIFICATE.findall(key_files.read(file))
        remedy = "restore it from a copy, or remove it and pair this machine again"
        if len(found) != 1:
            raise KeyFileError(f"{file}: must hold a private key and a certificate: {remedy}")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without a password, the terminal would be asked for that of an encrypted key.
            context.load_cert_chain(file, password="")
            certificate = ssl.PEM_cert_to_DER_cert(found[0])
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise KeyFileError(f"{file}: its key and certificate cannot be used: {remedy}") from error
        return cls(node_name(name or socket.gethostname()), certificate, file)


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate's DER, as 64 hexadecimal digits. Nodes are told apart by it."""
    return hashlib.sha256(certificate).hexdigest()


def node_name(text: str) -> str:
    """`text` as a node's name: what is neither letter, digit, dot nor dash becomes a dash. Never empty, 64 at most."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip(".-")[:NODE_NAME_CHARACTERS] or "node"


def check_readable(der: bytes) -> None:
    """ValueError unless `der` is one certificate that OpenSSL can read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=der)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError("a certificate that cannot be read") from error
    if context.cert_store_stats()["x509"] != 1 or len(der) > MAX_CERTIFICATE_BYTES:
        raise ValueError("more than one certificate")


def check_certificate(der: bytes) -> bytes:
    """`der`, if it is a certificate as nodes have: self-signed, on the curve P-256. ValueError otherwise."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    if len(der) > MAX_CERTIFICATE_BYTES:
        raise ValueError(f"certificate of {len(der)} bytes: must be at most {MAX_CERTIFICATE_BYTES}")
    try:
        parsed = x509.load_der_x509_certificate(der)
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("certificate with a key of another kind: must be on the curve P-256")
        parsed.verify_directly_issued_by(parsed)
    except (InvalidSignature, TypeError) as error:
        raise ValueError("certificate that is not signed by itself") from error
    return der


def _made() -> str:
    """A new key and its certificate, in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    # The name is of use to OpenSSL only, which looks for an issuer by it among all pinned certificates.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"shoal-{secrets.token_hex(8)}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (private + certificate.public_bytes(serialization.Encoding.PEM)).decode("ascii")
