"""The bus's own certificate authority and server certificate; clients know the CA, or pin the certificate when they join.

The server certificate carries the name mcp-bus, not an address, so addresses may change. cryptography is imported only
where a certificate is made or looked into: it costs memory that the master and the agents need not spend.
"""

from __future__ import annotations

import hashlib
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import attrs

from mcp.model.errors import AdapterError
from mcp.model.values import frozen

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SERVER_NAME = "mcp-bus"
"""What clients ask for (tls_hostname), whatever the address."""

AUTHORITY_DAYS = 20 * 365
SERVER_DAYS = 5 * 365
BACKDATED = timedelta(days=30)
"""How far a node's clock may lag (a board without a battery clock) and still find the certificates valid."""


@frozen
class Certificate:
    """A certificate and its private key, as PEM text."""

    pem: str
    key_pem: str = attrs.field(repr=False)

    def text(self) -> str:
        """Return both, for one file."""
        return self.pem + self.key_pem


def new_authority(fleet: str, now_s: float) -> Certificate:
    """Make a self-signed EC P-256 authority that can only vouch for the bus's name."""
    from cryptography import x509

    key = _new_private_key()
    name = _name(f"MCP bus CA of {fleet}")
    builder = (
        _builder(name, name, key.public_key(), now_s, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints([x509.DNSName(SERVER_NAME)], None), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _signed(builder, key, key)


def new_server_certificate(authority: Certificate, now_s: float) -> Certificate:
    """Make the certificate that nats-server shows, with a fresh key.

    Raises:
        AdapterError: the authority is not one of ours.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    issuer = x509.load_pem_x509_certificate(authority.pem.encode())
    issuer_key = serialization.load_pem_private_key(authority.key_pem.encode(), password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise AdapterError("cannot make a bus certificate: the authority's key is no EC key", code="certificate")
    key = _new_private_key()
    builder = (
        _builder(_name(SERVER_NAME), issuer.subject, key.public_key(), now_s, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return _signed(builder, key, issuer_key)


def fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate (its DER bytes) as 64 hex digits: what a join token pins.

    Other things may follow the certificate in the text.

    Raises:
        ValueError: there is no certificate.
    """
    first, end, _ = pem.strip().partition("-----END CERTIFICATE-----")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first + end)).hexdigest()


def expires_at_s(pem: str) -> float:
    """Return when a certificate ends, in seconds since 1970."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.timestamp()


def is_renewal_due(pem: str, now_s: float) -> bool:
    """Say whether less than a third of the server certificate's life is left."""
    return expires_at_s(pem) - now_s < SERVER_DAYS * 86400 / 3


def is_issued_by(pem: str, authority_pem: str) -> bool:
    """Say whether a certificate was signed by this authority."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        x509.load_pem_x509_certificate(pem.encode()).verify_directly_issued_by(
            x509.load_pem_x509_certificate(authority_pem.encode())
        )
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def _new_private_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now_s: float, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.fromtimestamp(now_s, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey
) -> Certificate:
    from cryptography.hazmat.primitives import hashes, serialization

    made = builder.sign(signer, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(made.public_bytes(serialization.Encoding.PEM).decode(), key_pem.decode())
