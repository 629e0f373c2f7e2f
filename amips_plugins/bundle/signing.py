"""Who made a bundle: signatures, and a policy that refuses a bundle without one.

A signature covers the bytes of the manifest, and through its checksums every other file. It lies
beside the manifest in ``manifest.sig``, in the format of model-signing: a DSSE envelope (by
Sigstore's bundle format) around an in-toto statement that names ``manifest.json`` and its sha256.
Needs the extra ``signing``, which is imported when something is signed or checked.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from amips_plugins.bundle.manifest import MANIFEST, SIGNATURE
from amips_plugins.bundle.package import Bundle, Fetch
from amips_plugins.errors import BundleUnsigned, InvalidInput, require
from amips_plugins.files import replace_file

__all__ = [
    "SIGNATURE_LIMIT",
    "Signer",
    "SigstoreIdentity",
    "sign_with_key",
    "sign_with_sigstore",
    "signature_check",
]

SIGNATURE_LIMIT = 1 << 16  # bytes; that of a key takes 1.3 kB, one of Sigstore its proofs besides


@dataclass(frozen=True)
class SigstoreIdentity:
    """Who has to have signed, as Sigstore certifies it.

    Attributes
    ----------
    identity
        The e-mail address, or the URI of a workload such as a CI workflow.
    issuer
        URL of the OpenID Connect provider that vouched for it.
    trust_config
        File with Sigstore's keys (a ``ClientTrustConfig`` in JSON), to use an instance of your own
        or none over the network. Left out: those of the public instance, asked for at every check.
    """

    identity: str
    issuer: str
    trust_config: str | Path | None = None

    def __str__(self) -> str:
        return f"{self.identity!r} of {self.issuer!r}"


Signer = str | Path | SigstoreIdentity


def signature_check(
    signers: Signer | Sequence[Signer] | None = None,
) -> Callable[[str, bytes, Fetch], None] | None:
    """Return a check for ``Bundle.open``: one of the signers has to have signed the manifest.

    A path is that of a PEM file with the public key of an elliptic curve (P-256, P-384 or P-521);
    it is read at every check. None stands for what the environment asks for, which may be nothing:
    ``AMIPS_REQUIRE_SIGNATURE`` names such files, separated as in ``PATH``, and
    ``AMIPS_REQUIRE_IDENTITY`` with ``AMIPS_REQUIRE_ISSUER`` an identity of Sigstore.

    Raises
    ------
    InvalidInput
        A signer cannot be checked against, such as a file that holds no such key, or a variable
        that is set and empty: a policy that was meant to be there is not dropped in silence.
    MissingExtra
        model-signing is not installed.
    """
    if signers is None:
        signers = _in_environment()
        if not signers:
            return None
    if isinstance(signers, str | Path | SigstoreIdentity):
        signers = [signers]
    if not signers:
        raise InvalidInput("A policy for signatures has to name a public key or an identity.")
    require("model_signing.verifying", "signing")  # now, and not when a bundle is refused for it
    return partial(_check, [_usable(signer) for signer in signers])


def sign_with_key(folder: Path, key: Path) -> None:
    """Sign the bundle in a folder with a private key of an elliptic curve, in PEM.

    Its password, if it has one, is ``$AMIPS_SIGNING_PASSWORD``. An unsound bundle is not signed,
    but raises ``BundleError``; a key that cannot be used raises ``InvalidInput``.
    """
    config = _signing()
    password = os.environ.get("AMIPS_SIGNING_PASSWORD")
    try:
        # model-signing declares a str, and hands it on to cryptography, which takes bytes only.
        secret: Any = password.encode() if password else None
        config.use_elliptic_key_signer(private_key=key, password=secret)
    except Exception as exc:
        raise InvalidInput(
            f"{key} cannot sign ({_said(exc)}); name a PEM file with the private key of an "
            f"elliptic curve, its password, if any, in AMIPS_SIGNING_PASSWORD."
        ) from exc
    _sign(folder, config)


def sign_with_sigstore(folder: Path) -> None:
    """Sign the bundle in a folder without a key, by the public instance of Sigstore.

    Identity is that of the CI job, where Sigstore knows its provider, or else of whoever logs in by
    the browser that opens. **It is published**, with the manifest's checksum, in a public log. An
    unsound bundle is not signed, but raises ``BundleError``; ``InvalidInput`` says that Sigstore
    does not sign, or cannot be reached.
    """
    config = _signing()
    try:
        config.use_sigstore_signer(use_ambient_credentials=True)
        _sign(folder, config)
    except (require("sigstore.errors", "signing").Error, OSError) as exc:
        raise InvalidInput(f"Sigstore does not sign: {_said(exc)}") from exc


class _PublicKey(msgspec.Struct):
    hint: str | None = None


class _Material(msgspec.Struct, rename="camel"):
    public_key: _PublicKey | None = None


class _Envelope(msgspec.Struct):
    payload: bytes  # base64 in JSON


class _Signature(msgspec.Struct, rename="camel"):
    verification_material: _Material
    dsse_envelope: _Envelope


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Predicate(msgspec.Struct):
    resources: list[_Resource]


class _Statement(msgspec.Struct):
    predicate: _Predicate


def _check(
    signers: Sequence[Path | SigstoreIdentity], location: str, manifest: bytes, fetch: Fetch
) -> None:
    """Refuse a manifest that none of the signers has signed."""
    names = " or ".join(str(signer) for signer in signers)
    do = f"publish it again, signed by {names}: see amips publish --help"
    try:
        signature = fetch(SIGNATURE, SIGNATURE_LIMIT)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise BundleUnsigned(f"The bundle at {location} is not signed; {do}.") from exc
    if len(signature) > SIGNATURE_LIMIT:
        raise BundleUnsigned(
            f"The signature of {location} is larger than {SIGNATURE_LIMIT} bytes; {do}."
        )
    reasons = []
    for signer in signers:
        reason = _refusal(signer, manifest, signature)
        if reason is None:
            return
        reasons.append(reason)
    raise BundleUnsigned(f"The signature of {location} is refused ({'; '.join(reasons)}); {do}.")


def _refusal(signer: Path | SigstoreIdentity, manifest: bytes, signature: bytes) -> str | None:
    try:
        _verify(signer, manifest, signature)
    except Exception as exc:  # noqa: BLE001 - whatever the library raises on a file of anybody's
        return _said(exc)
    return None


def _verify(signer: Path | SigstoreIdentity, manifest: bytes, signature: bytes) -> None:
    """Raise unless the signer has signed exactly this manifest."""
    signed = msgspec.json.decode(signature, type=_Signature)
    key = signed.verification_material.public_key
    if not isinstance(signer, SigstoreIdentity) and (key is None or not key.hint):
        raise ValueError("it was not made with a key")  # model-signing would print a warning
    # model-signing compares a folder with what the statement says to look at and to ignore; of
    # statements that the same key made of anything else, none may pass.
    statement = msgspec.json.decode(signed.dsse_envelope.payload, type=_Statement)
    digest = hashlib.sha256(manifest).hexdigest()
    if statement.predicate.resources != [_Resource(MANIFEST, "sha256", digest)]:
        raise ValueError("it is the signature of another manifest")
    with tempfile.TemporaryDirectory(prefix="amips-") as private:
        path = Path(private) / SIGNATURE
        path.write_bytes(signature)
        _verifier(signer).verify(_folder(Path(private), "bundle", manifest), path)


def _verifier(signer: Path | SigstoreIdentity) -> Any:
    config = require("model_signing.verifying", "signing").Config()
    if isinstance(signer, SigstoreIdentity):
        trust = None if signer.trust_config is None else Path(signer.trust_config)
        return config.use_sigstore_verifier(
            identity=signer.identity, oidc_issuer=signer.issuer, trust_config=trust
        )
    return config.use_elliptic_key_verifier(public_key=signer)


def _signing() -> Any:
    return require("model_signing.signing", "signing").Config()


def _sign(folder: Path, config: Any) -> None:
    bundle = Bundle.in_folder(folder)
    for name in bundle.manifest.files:
        bundle.read(name)
    with tempfile.TemporaryDirectory(prefix="amips-") as private:
        path = Path(private) / SIGNATURE
        config.sign(_folder(Path(private), bundle.manifest.version, bundle.content), path)
        replace_file(folder / SIGNATURE, path.read_bytes())


def _folder(parent: Path, name: str, manifest: bytes) -> Path:
    """Make the folder that model-signing signs: the manifest and nothing else."""
    folder = parent / name
    folder.mkdir()
    (folder / MANIFEST).write_bytes(manifest)
    return folder


def _in_environment() -> list[Signer]:
    keys = os.environ.get("AMIPS_REQUIRE_SIGNATURE")
    signers: list[Signer] = [] if keys is None else [*keys.split(os.pathsep)]
    identity = os.environ.get("AMIPS_REQUIRE_IDENTITY")
    issuer = os.environ.get("AMIPS_REQUIRE_ISSUER")
    if identity is not None or issuer is not None:
        signers.append(SigstoreIdentity(identity or "", issuer or ""))
    return signers


def _usable(signer: Signer) -> Path | SigstoreIdentity:
    """Return a signer that can be checked against, a key by its whole path."""
    if isinstance(signer, SigstoreIdentity):
        if not (signer.identity and signer.issuer):
            raise InvalidInput("A signer by Sigstore needs both an identity and an issuer.")
        if signer.trust_config is None:
            return signer  # its keys come over the network: not before there is a bundle to check
    elif not str(signer):
        raise InvalidInput(
            "The path of the public key that has to have signed is empty; name a file, or unset "
            "AMIPS_REQUIRE_SIGNATURE."
        )
    else:
        signer = Path(signer).absolute()
    try:
        _verifier(signer)
    except Exception as exc:
        raise InvalidInput(
            f"No signature can be checked against {signer} ({_said(exc)}); name a PEM file with "
            f"the public key of an elliptic curve, or for Sigstore its trust config."
        ) from exc
    return signer


def _said(exc: Exception) -> str:
    """Return one line of an error, of bounded length: parts of it may be the signature's."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text[:200].rstrip(".")
