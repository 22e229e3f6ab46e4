"""A certificate authority for tests, with a server's certificate and a node's."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SERVED_AS: Final = "api.cluster.test"


def key_of() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certified(
    name: str, key: ec.EllipticCurvePrivateKey, by: Any = None, by_key: Any = None
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(SERVED_AS), x509.IPAddress(ipaddress.ip_address("127.0.0.2"))]
    ca = by is None
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=ca, crl_sign=ca,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(by_key or key, hashes.SHA256())
    )


class Authority:
    """A certificate authority, and the certificates that it issued."""

    def __init__(self, directory: Path) -> None:
        key = key_of()
        self.certificate = certified("ca", key)
        self.ca = self.certificate.public_bytes(serialization.Encoding.PEM)
        self.files = {}
        self.pems = {}
        for name in ("server", "node"):
            own = key_of()
            made = certified(name, own, self.certificate, key)
            self.pems[name] = made.public_bytes(serialization.Encoding.PEM), pem(own)
            self.files[name] = directory / f"{name}.crt", directory / f"{name}.key"
            for path, data in zip(self.files[name], self.pems[name], strict=True):
                path.write_bytes(data)
        (directory / "ca.crt").write_bytes(self.ca)
