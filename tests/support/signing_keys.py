"""Keys to sign with, made on the spot."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

Key = tuple[Path, Path]  # private, public


def write_key(
    folder: Path,
    name: str = "key",
    *,
    curve: ec.EllipticCurve | None = None,
    password: str | None = None,
    is_rsa: bool = False,
) -> Key:
    """Write NAME.pem and NAME.pub; P-256 unless told otherwise."""
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = (
        rsa.generate_private_key(65537, 2048)
        if is_rsa
        else ec.generate_private_key(curve or ec.SECP256R1())
    )
    lock: KeySerializationEncryption = (
        NoEncryption() if password is None else BestAvailableEncryption(password.encode())
    )
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
