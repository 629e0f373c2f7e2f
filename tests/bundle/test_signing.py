"""Signing, and the policy of a registry that requires it.

What a bad signature does to a router that runs: ``tests/faults/test_signature_faults.py``. Of
Sigstore only what needs no network is tested: that its verifier is built with the identity and the
issuer asked for and Sigstore's own keys, and that it refuses what nobody certified. That it accepts
what Sigstore has signed, and signing itself, is not: both take its servers and somebody's identity.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import shutil
import subprocess
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sigstore
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import hashing, signing, verifying
from sigstore.errors import TUFError

from amips_plugins import Registry
from amips_plugins.bundle.contents import MODEL
from amips_plugins.bundle.manifest import MANIFEST, SIGNATURE
from amips_plugins.bundle.package import Bundle, Fetch
from amips_plugins.bundle.signing import (
    SIGNATURE_LIMIT,
    Signer,
    SigstoreIdentity,
    sign_with_key,
    sign_with_sigstore,
    signature_check,
)
from amips_plugins.cli import main
from amips_plugins.collection import collection_key
from amips_plugins.errors import BundleCorrupt, BundleNotFound, BundleUnsigned, InvalidInput
from amips_plugins.files import read_file
from tests.support.bundles import memory, write_bundle
from tests.support.signing_keys import Key, write_key

KEY = collection_key(memory().info)
VARIABLES = (
    "AMIPS_REQUIRE_SIGNATURE",
    "AMIPS_REQUIRE_IDENTITY",
    "AMIPS_REQUIRE_ISSUER",
    "AMIPS_SIGNING_PASSWORD",
)


@pytest.fixture(autouse=True)
def _no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return write_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return write_key(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture
def signed(tmp_path: Path, key: Key) -> Path:
    folder = write_bundle(tmp_path / "signed")
    sign_with_key(folder, key[0])
    return folder


def check(folder: Path, *signers: Signer) -> Bundle:
    """Open a bundle that one of the signers has to have signed."""
    return Bundle.in_folder(folder, signature_check(signers))


# Keys


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_what_is_signed_is_accepted(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = write_key(tmp_path, curve=curve)
    folder = write_bundle(tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sign_with_key(folder, private)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(after.pop(SIGNATURE)) < 4096
    assert after == before
    bundle = check(folder, public)
    assert bundle.manifest.version == "v1"
    assert SIGNATURE not in bundle.manifest.files


def test_it_says_what_model_signing_would_say_of_the_manifest(
    signed: Path, tmp_path: Path, key: Key
) -> None:
    """The file is no format of our own: the tool that comes with model-signing reads it."""
    (tmp_path / "alone").mkdir()
    shutil.copy(signed / MANIFEST, tmp_path / "alone")
    config = verifying.Config().use_elliptic_key_verifier(public_key=key[1])
    config.verify(tmp_path / "alone", signed / SIGNATURE)


def test_a_key_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_key(tmp_path, password="open sesame")  # noqa: S106 - of a test
    folder = write_bundle(tmp_path / "bundle")
    for wrong in (None, "hunter2"):
        if wrong is not None:
            monkeypatch.setenv("AMIPS_SIGNING_PASSWORD", wrong)
        with pytest.raises(InvalidInput, match=r"cannot sign .* in AMIPS_SIGNING_PASSWORD\.$") as e:
            sign_with_key(folder, private)
        assert "hunter2" not in str(e.value)
    assert not (folder / SIGNATURE).exists()
    monkeypatch.setenv("AMIPS_SIGNING_PASSWORD", "open sesame")
    sign_with_key(folder, private)
    check(folder, public)


def test_keys_that_cannot_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path / "bundle")
    private, public = write_key(tmp_path)
    (tmp_path / "text").write_text("no key")
    bad = [
        public,
        tmp_path / "text",
        tmp_path / "nowhere",
        tmp_path,
        write_key(tmp_path, "koblitz", curve=ec.SECP256K1())[0],
        write_key(tmp_path, "rsa", is_rsa=True)[0],
    ]
    for path in bad:
        with pytest.raises(InvalidInput, match=r"cannot sign \(.+\); name a PEM file") as caught:
            sign_with_key(folder, path)
        assert str(path) in str(caught.value)
    monkeypatch.setenv("AMIPS_SIGNING_PASSWORD", "of another key")
    with pytest.raises(InvalidInput, match="cannot sign"):
        sign_with_key(folder, private)
    assert not (folder / SIGNATURE).exists()


def test_nothing_damaged_is_signed(tmp_path: Path, key: Key) -> None:
    with pytest.raises(BundleNotFound):
        sign_with_key(tmp_path, key[0])
    folder = write_bundle(tmp_path / "bundle")
    (folder / MODEL).write_bytes(b"other")
    with pytest.raises(BundleCorrupt, match="checksum"):
        sign_with_key(folder, key[0])
    assert not (folder / SIGNATURE).exists()


def test_the_commands_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("openssl ")]
    for command, asked in zip(commands, ("-pass", "-passin"), strict=True):
        typed = [*command.split(), asked, "pass:open sesame"]
        subprocess.run(typed, cwd=tmp_path, check=True)  # noqa: S603 - our own page
    monkeypatch.setenv("AMIPS_SIGNING_PASSWORD", "open sesame")
    folder = write_bundle(tmp_path / "bundle")
    sign_with_key(folder, tmp_path / "amips.pem")
    check(folder, tmp_path / "amips.pub")


# The policy


def test_any_one_of_several_signers_will_do(signed: Path, key: Key, other: Key) -> None:
    check(signed, other[1], str(key[1]))
    check(signed, key[1], SigstoreIdentity("nobody@example.org", "https://issuer.example.org"))
    with pytest.raises(BundleUnsigned, match="Key mismatch") as caught:
        check(signed, other[1])
    assert str(signed) in str(caught.value)
    assert str(other[1]) in str(caught.value)


def test_a_key_is_read_at_every_check(signed: Path, tmp_path: Path, key: Key, other: Key) -> None:
    """So a key is exchanged by exchanging its file; one that is gone lets nothing pass."""
    trusted = Path(shutil.copy(other[1], tmp_path / "trusted.pub"))
    policy = signature_check(trusted)
    with pytest.raises(BundleUnsigned):
        Bundle.in_folder(signed, policy)
    shutil.copy(key[1], trusted)
    Bundle.in_folder(signed, policy)
    trusted.unlink()
    with pytest.raises(BundleUnsigned, match="No such file"):
        Bundle.in_folder(signed, policy)


def test_signers_that_cannot_be_checked_against(tmp_path: Path, key: Key) -> None:
    (tmp_path / "text").write_text("no key")
    bad: list[Any] = [
        [],
        "",
        "nowhere.pub",
        tmp_path,
        tmp_path / "text",
        key[0],  # the private one
        write_key(tmp_path, "koblitz", curve=ec.SECP256K1())[1],
        write_key(tmp_path, "rsa", is_rsa=True)[1],
        [key[1], "nowhere.pub"],
        SigstoreIdentity("", "https://issuer.example.org"),
        SigstoreIdentity("nobody@example.org", ""),
        SigstoreIdentity("nobody@example.org", "https://issuer.example.org", tmp_path / "text"),
    ]
    for signers in bad:
        with pytest.raises(InvalidInput, match=r"; name |has to name|needs both") as caught:
            Registry(tmp_path, require_signature=signers)
        assert "PRIVATE" not in str(caught.value)


def test_the_policy_of_the_environment(
    signed: Path, key: Key, other: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert signature_check() is None
    monkeypatch.setenv("AMIPS_REQUIRE_SIGNATURE", str(other[1]))
    with pytest.raises(BundleUnsigned):
        Bundle.in_folder(signed, signature_check())
    Bundle.in_folder(signed, signature_check(key[1]))  # what the program says goes first
    monkeypatch.setenv("AMIPS_REQUIRE_SIGNATURE", f"{other[1]}{os.pathsep}{key[1]}")
    Bundle.in_folder(signed, signature_check())
    for value in ("", os.pathsep, f"{key[1]}{os.pathsep}"):
        monkeypatch.setenv("AMIPS_REQUIRE_SIGNATURE", value)
        with pytest.raises(InvalidInput, match="unset AMIPS_REQUIRE_SIGNATURE"):
            Registry("registry")
    monkeypatch.delenv("AMIPS_REQUIRE_SIGNATURE")
    monkeypatch.setenv("AMIPS_REQUIRE_IDENTITY", "nobody@example.org")
    with pytest.raises(InvalidInput, match="both an identity and an issuer"):
        Registry("registry")
    monkeypatch.setenv("AMIPS_REQUIRE_ISSUER", "https://issuer.example.org")
    with pytest.raises(BundleUnsigned, match=r"'nobody@example.org' of 'https://issuer.exam"):
        Bundle.in_folder(signed, signature_check())


def test_a_registry_with_a_policy_can_be_pickled(tmp_path: Path, signed: Path, key: Key) -> None:
    registry = Registry(tmp_path / "registry", require_signature=key[1])
    registry.publish(signed)
    assert pickle.loads(pickle.dumps(registry)).open(KEY).manifest.version == "v1"  # noqa: S301


# What is read, and when


def watched(folder: Path, read: list[str]) -> Fetch:
    def fetch(name: str, limit: int) -> bytes:
        read.append(f"{name} {limit}")
        return read_file(folder / name, limit)

    return fetch


def test_nothing_is_decoded_or_read_before_the_signature_is_checked(signed: Path, key: Key) -> None:
    (signed / MANIFEST).write_bytes(b'{"format": 99, nonsense')
    read: list[str] = []
    with pytest.raises(BundleUnsigned, match="signature of another manifest"):
        Bundle.open("here", watched(signed, read), signature_check(key[1]))
    assert read == [f"{MANIFEST} {1 << 20}", f"{SIGNATURE} {SIGNATURE_LIMIT}"]
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        Bundle.in_folder(signed)  # without a policy it is decoded


def test_the_bytes_that_were_checked_are_those_decoded(signed: Path, key: Key) -> None:
    """A file that changes between two reads: there is one read only."""
    answers = [(signed / MANIFEST).read_bytes(), b"{}"]

    def fetch(name: str, limit: int) -> bytes:
        return answers.pop(0) if name == MANIFEST else read_file(signed / name, limit)

    bundle = Bundle.open("here", fetch, signature_check(key[1]))
    assert bundle.manifest.version == "v1"
    assert answers == [b"{}"]
    assert msgspec.json.decode(bundle.content)["version"] == "v1"


def test_a_signature_at_the_limit_is_read_and_one_past_it_is_not(signed: Path, key: Key) -> None:
    path = signed / SIGNATURE
    content = path.read_bytes()
    path.write_bytes(content + b" " * (SIGNATURE_LIMIT - len(content)))
    check(signed, key[1])
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleUnsigned, match="larger than 65536 bytes"):
        check(signed, key[1])


def test_a_manifest_cannot_name_the_signature_as_its_file(tmp_path: Path) -> None:
    def named(files: dict[str, bytes]) -> None:
        files[SIGNATURE] = b"{}"

    with pytest.raises(BundleCorrupt, match=r"names the file 'manifest\.sig'"):
        Bundle.in_folder(write_bundle(tmp_path, change=named))


# Signatures that are genuine, and of something else


def altered(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def sign_nothing(folder: Path, key: Key) -> None:
    """The key's owner signs a folder without a file that counts; it is put beside a bundle."""
    empty = folder.parent / "empty"
    empty.mkdir()
    (empty / MANIFEST).write_text("whatever")
    config = signing.Config().use_elliptic_key_signer(private_key=key[0])
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[MANIFEST]))
    config.sign(empty, folder / SIGNATURE)


def test_a_signature_that_ignores_the_manifest(tmp_path: Path, key: Key) -> None:
    """The library says that it fits ours, as it fits any."""
    folder = write_bundle(tmp_path / "bundle")
    sign_nothing(folder, key)
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / MANIFEST, tmp_path / "alone")
    library = verifying.Config().use_elliptic_key_verifier(public_key=key[1])
    library.verify(tmp_path / "alone", folder / SIGNATURE)
    with pytest.raises(BundleUnsigned, match="signature of another manifest"):
        check(folder, key[1])


def members(*pairs: tuple[str, Any]) -> str:
    """A JSON object, in which a name may come twice."""
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}"


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("twice", ["dsseEnvelope", "dsse_envelope", "payload"])
def test_a_file_that_two_parsers_could_read_in_two_ways(
    tmp_path: Path, key: Key, other: Key, twice: str, step: int
) -> None:
    """One statement for our check, the genuine one of nothing for the library: one must object."""
    folder = write_bundle(tmp_path / "bundle")
    sign_nothing(folder, key)
    genuine = json.loads((folder / SIGNATURE).read_bytes())
    sign_with_key(folder, other[0])
    ours = json.loads((folder / SIGNATURE).read_bytes())["dsseEnvelope"]
    theirs = genuine.pop("dsseEnvelope")
    if twice == "payload":
        texts = [json.dumps(envelope["payload"]) for envelope in (ours, theirs)][::step]
        rest = [(name, json.dumps(theirs[name])) for name in ("payloadType", "signatures")]
        envelopes = [("dsseEnvelope", members(*rest, *(("payload", text) for text in texts)))]
    else:
        envelopes = [("dsseEnvelope", json.dumps(ours)), (twice, json.dumps(theirs))][::step]
    rest = [(name, json.dumps(value)) for name, value in genuine.items()]
    (folder / SIGNATURE).write_text(members(*rest, *envelopes))
    with pytest.raises(BundleUnsigned):
        check(folder, key[1])


def test_a_signature_in_shards_is_not_ours(signed: Path, tmp_path: Path, key: Key) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(signed / MANIFEST, tmp_path / "alone")
    config = signing.Config().use_elliptic_key_signer(private_key=key[0])
    config.set_hashing_config(hashing.Config().use_shard_serialization())
    config.sign(tmp_path / "alone", signed / SIGNATURE)
    with pytest.raises(BundleUnsigned, match="signature of another manifest"):
        check(signed, key[1])


def test_a_statement_that_is_changed(signed: Path, key: Key) -> None:
    """Its digest is put right for a manifest that was changed: the signature is then wrong."""
    manifest = signed / MANIFEST
    old, new = manifest.read_bytes(), manifest.read_bytes().replace(b"made by hand", b"made to fit")
    assert new != old
    manifest.write_bytes(new)

    def restate(content: Any) -> None:
        envelope = content["dsseEnvelope"]
        text = base64.b64decode(envelope["payload"])
        envelope["payload"] = base64.b64encode(restated(text, old, new)).decode()

    altered(signed / SIGNATURE, restate)
    with pytest.raises(BundleUnsigned, match="InvalidSignature"):
        check(signed, key[1])


def restated(statement: bytes, old: bytes, new: bytes) -> bytes:
    """A statement about other bytes, consistent in itself."""

    def digest(data: bytes) -> str:
        hasher = hashes.Hash(hashes.SHA256())
        hasher.update(data)
        return hasher.finalize().hex()

    def root(data: bytes) -> str:
        return digest(bytes.fromhex(digest(data)))

    for before, after in ((digest(old), digest(new)), (root(old), root(new))):
        assert before.encode() in statement
        statement = statement.replace(before.encode(), after.encode())
    return statement


def test_a_signature_without_the_name_of_its_key(
    signed: Path, key: Key, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library would print a warning, to whatever the program writes.

    Not read from the file descriptor: channels of other tests in this process write there, too.
    """
    materials: list[Any] = [{}, {"publicKey": {}}, {"publicKey": {"hint": ""}}]
    for material in materials:
        content = json.loads((signed / SIGNATURE).read_bytes())
        content["verificationMaterial"] = material
        (signed / SIGNATURE).write_text(json.dumps(content))
        with pytest.raises(BundleUnsigned, match="not made with a key"):
            check(signed, key[1])
    assert capsys.readouterr() == ("", "")


def test_whatever_is_changed_no_other_error_and_no_other_manifest(signed: Path, key: Key) -> None:
    path, rng = signed / SIGNATURE, random.Random(0)  # noqa: S311 - to be repeatable
    content, manifest = path.read_bytes(), (signed / MANIFEST).read_bytes()
    policy = signature_check(key[1])
    refusals: list[str] = []
    for _ in range(400):
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 4])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 9])] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b'"', b"{", b"[" * 2000, b"\\u0000", b"null"]
            )
        path.write_bytes(data)
        try:
            bundle = Bundle.in_folder(signed, policy)
        except BundleUnsigned as exc:
            refusals.append(str(exc))
        else:  # a change of what says nothing, such as the id of the key
            assert bundle.content == manifest
    assert len(refusals) > 300
    assert max(len(refusal) for refusal in refusals) < 1000
    assert not any("\n" in refusal for refusal in refusals)


# In a registry


@pytest.fixture
def registry(tmp_path: Path, key: Key) -> Registry:
    return Registry(tmp_path / "registry", require_signature=key[1])


def test_publishing_needs_the_signature_too(
    registry: Registry, tmp_path: Path, key: Key, other: Key
) -> None:
    folder = write_bundle(tmp_path / "made")
    with pytest.raises(BundleUnsigned, match="is not signed; publish it again, signed by"):
        registry.publish(folder)
    sign_with_key(folder, other[0])
    with pytest.raises(BundleUnsigned, match="is refused"):
        registry.publish(folder)
    assert not Path(registry.root).exists()
    sign_with_key(folder, key[0])
    assert registry.publish(folder) == "v1"
    assert registry.open(KEY).manifest.version == "v1"
    assert registry.signed(KEY, "v1")


def test_a_signature_that_comes_later(
    registry: Registry, tmp_path: Path, key: Key, other: Key
) -> None:
    folder = write_bundle(tmp_path / "made")
    unruled = Registry(registry.root)
    unruled.publish(folder)
    assert not unruled.signed(KEY, "v1")
    with pytest.raises(BundleUnsigned):
        registry.open(KEY)
    sign_with_key(folder, key[0])
    unruled.publish(folder)  # adds it
    assert registry.open(KEY).manifest.version == "v1"
    (folder / SIGNATURE).unlink()
    unruled.publish(folder)  # leaves it
    assert registry.open(KEY).manifest.version == "v1"
    sign_with_key(folder, other[0])
    unruled.publish(folder)  # replaces it
    with pytest.raises(BundleUnsigned):
        registry.open(KEY)
    both = Registry(registry.root, require_signature=[key[1], other[1]])
    assert both.open(KEY).manifest.version == "v1"
    assert unruled.versions(KEY) == ["v1"]


def test_a_signature_is_there_before_its_version(
    registry: Registry, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Registry._write

    def noted(self: Registry, path: str, data: bytes) -> None:
        written.append(path.rpartition("/")[2])
        write(self, path, data)

    monkeypatch.setattr(Registry, "_write", noted)
    registry.publish(signed)
    assert written.index(SIGNATURE) < written.index(MANIFEST)


def test_an_object_store(signed: Path, key: Key, other: Key) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    Registry(root, require_signature=key[1]).publish(signed)
    assert Registry(root).signed(KEY, "v1")
    assert Registry(root, require_signature=key[1]).open(KEY).manifest.version == "v1"
    with pytest.raises(BundleUnsigned):
        Registry(root, require_signature=other[1]).open(KEY)


def test_a_signature_that_is_too_large_is_not_published(tmp_path: Path, signed: Path) -> None:
    os.truncate(signed / SIGNATURE, 1 << 40)
    with pytest.raises(BundleCorrupt, match="larger than 65536 bytes"):
        Registry(tmp_path / "registry").publish(signed)
    assert not (tmp_path / "registry").exists()


def test_an_old_signed_version_may_be_put_forward_again(
    registry: Registry, tmp_path: Path, key: Key
) -> None:
    """What a signature does not prevent, as docs/security.md says: the pointer is not signed."""
    for version in ("v1", "v2"):
        folder = write_bundle(tmp_path / version, version=version)
        sign_with_key(folder, key[0])
        registry.publish(folder)
    home = Path(registry._home(KEY))
    (home / "latest.json").write_text('{"version": "v1"}')
    assert registry.open(KEY).manifest.version == "v1"
    shutil.rmtree(home / "v2")
    shutil.copytree(home / "v1", home / "v2")
    with pytest.raises(BundleCorrupt, match="is version v1"):  # but under its own name only
        registry.open(KEY, "v2")


# The command line


def run(*arguments: str, fails: bool = False) -> None:
    if fails:
        with pytest.raises(SystemExit, match="1"):
            main(list(arguments))
    else:
        main(list(arguments))


def test_the_command_line(
    tmp_path: Path,
    key: Key,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    collection = "/".join([KEY.database, KEY.name, KEY.field])
    for version in ("v1", "v2"):
        write_bundle(tmp_path / version / "bundle", version=version)
    run("publish", "v1")
    run("publish", "v2", "--sign-key", str(key[0]))
    run("registry", "list", collection)
    assert capsys.readouterr().out.splitlines()[-2:] == ["  v1", "* v2 (signed)"]
    monkeypatch.setenv("AMIPS_REQUIRE_SIGNATURE", str(key[1]))
    run("publish", "v1", fails=True)
    assert "v1/bundle is not signed; publish it again, signed by" in capsys.readouterr().err
    run("publish", "v1", "--sign-key", str(key[0]))
    run("registry", "pin", collection, "v1")
    run("registry", "list", collection)
    assert capsys.readouterr().out.splitlines()[-2:] == ["* v1 (pinned, signed)", "  v2 (signed)"]
    run("registry", "list", collection, "--json")
    assert json.loads(capsys.readouterr().out)["signed"] == ["v1", "v2"]
    run("publish", "v1", "--sign-key", str(key[0]), "--sign-sigstore", fails=True)
    assert "not both" in capsys.readouterr().err
    run("publish", "v1", "--sign-key", str(key[1]), fails=True)
    assert "cannot sign" in capsys.readouterr().err


# Sigstore, as far as it goes without its servers


@pytest.fixture(scope="module")
def trust_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of the public instance, as the package sigstore brings them."""
    store = Path(sigstore.__file__).parent / "_store" / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"
    config = {
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": json.loads((store / "trusted_root.json").read_bytes()),
        "signingConfig": json.loads((store / "signing_config.v0.2.json").read_bytes()),
    }
    path = tmp_path_factory.mktemp("sigstore") / "trust.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def somebody(trust_config: Path) -> SigstoreIdentity:
    return SigstoreIdentity("nobody@example.org", "https://issuer.example.org", trust_config)


def test_its_verifier_has_the_identity_and_the_issuer(
    signed: Path, somebody: SigstoreIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    use = verifying.Config.use_sigstore_verifier

    def noted(self: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return use(self, **arguments)

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", noted)
    with pytest.raises(BundleUnsigned):
        check(signed, somebody)
    assert asked == 2 * [  # for the policy, and for the check
        {
            "identity": "nobody@example.org",
            "oidc_issuer": "https://issuer.example.org",
            "trust_config": somebody.trust_config,
        }
    ]


def test_the_signature_of_a_key_is_none_of_sigstore(
    signed: Path, somebody: SigstoreIdentity
) -> None:
    with pytest.raises(BundleUnsigned, match="expected certificate"):
        check(signed, somebody)


def test_a_certificate_of_anybodys_own(signed: Path, somebody: SigstoreIdentity) -> None:
    """It has the right identity in it, and nobody who vouches for that."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(minutes=10))
    alternative = x509.SubjectAlternativeName([x509.RFC822Name("nobody@example.org")])
    for extension in (
        alternative,
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]),
    ):
        builder = builder.add_extension(extension, critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    raw = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
    proof = {
        "logIndex": "0",
        "rootHash": raw[:44],
        "treeSize": "1",
        "hashes": [],
        "checkpoint": {"envelope": "none"},
    }
    entry = {
        "logIndex": "0",
        "logId": {"keyId": "AAAA"},
        "kindVersion": {"kind": "dsse", "version": "0.0.1"},
        "integratedTime": str(int(now.timestamp())),
        "inclusionPromise": {"signedEntryTimestamp": "AAAA"},
        "inclusionProof": proof,
        "canonicalizedBody": "e30=",
    }

    def replace(content: Any) -> None:
        content["verificationMaterial"] = {
            "certificate": {"rawBytes": raw},
            "tlogEntries": [entry],
        }

    altered(signed / SIGNATURE, replace)
    with pytest.raises(BundleUnsigned, match=r"certificate chain: .*candidates exhausted"):
        check(signed, somebody)


def test_signing_asks_for_the_identity_of_the_job(
    tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Sigstore's servers, which no test can have sign."""
    asked: list[dict[str, Any]] = []

    def instead(self: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return self.use_elliptic_key_signer(private_key=key[0])

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", instead)
    folder = write_bundle(tmp_path / "bundle")
    run("publish", str(folder), "--registry", str(tmp_path / "registry"), "--sign-sigstore")
    assert asked == [{"use_ambient_credentials": True}]
    check(folder, key[1])
    assert Registry(tmp_path / "registry").signed(KEY, "v1")


@pytest.mark.parametrize("error", [TUFError("no metadata"), ConnectionError("no route")])
def test_a_sigstore_out_of_reach_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def instead(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", instead)
    folder = write_bundle(tmp_path / "bundle")
    with pytest.raises(InvalidInput, match="Sigstore does not sign: no "):
        sign_with_sigstore(folder)
    assert not (folder / SIGNATURE).exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 60_000, b"null"])
def test_rubbish(signed: Path, somebody: SigstoreIdentity, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleUnsigned, match="is refused"):
        check(signed, somebody)
