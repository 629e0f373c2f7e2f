"""Every bad signature: the version is refused by name, and the router answers as before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.bundle.contents import MODEL
from amips_plugins.bundle.manifest import MANIFEST, SIGNATURE
from amips_plugins.bundle.signing import sign_with_key
from amips_plugins.collection import collection_key
from amips_plugins.routing.serving import serving_bundle
from tests.support.bundles import laid_out, memory, other_cells, write_bundle
from tests.support.routing_data import QUERIES, assert_native, logged
from tests.support.signing_keys import write_key
from tests.support.terminal import written

KEY = collection_key(memory().info)

Damage = Callable[[Path], None]  # of a version where it is published, by one who may write there


def cut(place: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / SIGNATURE).read_bytes()
        (folder / SIGNATURE).write_bytes(content[: place % len(content)])

    return damage


def signature(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / SIGNATURE
        path.write_bytes(change(path.read_bytes()))

    return damage


def inside(change: Callable[[Any], None]) -> Damage:
    def alter(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return signature(alter)


def by_another_key(folder: Path) -> None:
    sign_with_key(folder, write_key(folder.parent, "other")[0])


def by_another_key_under_our_name(folder: Path) -> None:
    by_another_key(folder)
    ours = json.loads((folder.parent / "v0" / SIGNATURE).read_bytes())
    inside(lambda c: c.update(verificationMaterial=ours["verificationMaterial"]))(folder)


def of_another_bundle(folder: Path) -> None:
    """A genuine one, of the version that everybody trusts."""
    shutil.copy(folder.parent / "v0" / SIGNATURE, folder)


def another_bundle(folder: Path) -> None:
    """A sound bundle of somebody's own, with right checksums, under the signature of the old."""
    kept = (folder / SIGNATURE).read_bytes()
    write_bundle(folder, version=folder.name, reason="mine", change=other_cells)
    (folder / SIGNATURE).write_bytes(kept)


def manifest(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_bytes(change(path.read_bytes()))

    return damage


def another_model(folder: Path) -> None:
    """And a manifest that has its checksum."""
    write_bundle(folder, version=folder.name, model="keynet")


def pipe(folder: Path) -> None:
    (folder / SIGNATURE).unlink()
    os.mkfifo(folder / SIGNATURE)


def in_a_folder(folder: Path) -> None:
    (folder / SIGNATURE).unlink()
    (folder / SIGNATURE).mkdir()


PLACES = np.random.default_rng(0).integers(1, 1 << 20, 20).tolist()

FAULTS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda f: (f / SIGNATURE).unlink(), "is not signed"),
    "a pipe": (pipe, "is not signed"),
    "a folder": (in_a_folder, "is not signed"),
    "empty": (signature(lambda _: b""), "is refused"),
    **{f"cut at {place}": (cut(place), "is refused") for place in PLACES},
    "nested": (signature(lambda _: b"[" * 60_000), "is refused"),
    "rubbish": (signature(lambda _: b"\xff\x00" * 500), "is refused"),
    "null": (signature(lambda _: b"null"), "is refused"),
    "too long": (signature(lambda d: d + b" " * (1 << 16)), "larger than 65536 bytes"),
    "a terabyte": (lambda f: os.truncate(f / SIGNATURE, 1 << 40), "larger than 65536 bytes"),
    "by another key": (by_another_key, "Key mismatch"),
    "by another key, under the name of ours": (by_another_key_under_our_name, "InvalidSignature"),
    "of another bundle": (of_another_bundle, "signature of another manifest"),
    "without signatures": (
        inside(lambda c: c["dsseEnvelope"].update(signatures=[])),
        "is refused",
    ),
    "of zeros": (
        inside(lambda c: c["dsseEnvelope"]["signatures"][0].update(sig="AAAA")),
        "InvalidSignature",
    ),
    "of another kind": (inside(lambda c: c.update(mediaType="text/plain")), "is refused"),
    "another manifest": (
        manifest(lambda d: d.replace(b"made by hand", b"made to fit")),
        "signature of another manifest",
    ),
    "one space more in the manifest": (
        manifest(lambda d: d + b" "),
        "signature of another manifest",
    ),
    "a manifest that is none": (manifest(lambda _: b"{"), "signature of another manifest"),
    "another bundle": (another_bundle, "signature of another manifest"),
    "another model": (another_model, "signature of another manifest"),
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_key(tmp_path_factory.mktemp("keys"))


class Published:
    """A registry that requires a signature, and whoever has the key."""

    def __init__(self, folder: Path, key: tuple[Path, Path]) -> None:
        self.folder, self.key = folder, key
        self.registry = Registry(folder / "registry", require_signature=key[1])
        self.publish("v0")

    def publish(self, version: str, **changes: Any) -> Path:
        """Publish a version, signed; return where it is."""
        folder = write_bundle(self.folder / version, version=version, **changes)
        sign_with_key(folder, self.key[0])
        self.registry.publish(folder)
        return Path(self.registry._home(KEY)) / version

    def router(self) -> LearnedRouter:
        """A router in the cells of the first version."""
        return LearnedRouter(laid_out(self.folder / "v0"), registry=self.registry, refresh=None)


@pytest.fixture
def published(tmp_path: Path, key: tuple[Path, Path]) -> Published:
    return Published(tmp_path, key)


ALL = pytest.mark.parametrize(
    ("damage", "message"), [pytest.param(*fault, id=name) for name, fault in FAULTS.items()]
)
SOME = pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(*FAULTS[name], id=name)
        for name in ("missing", "by another key", "another bundle")
    ],
)


def assert_serves(router: LearnedRouter, version: str) -> None:
    assert router.manifest is not None
    assert router.manifest.version == version
    found = router.search(QUERIES, k=5, n_probes=3)
    assert {(hits.trace.mode, hits.trace.version) for hits in found} == {("route", version)}
    assert not router.fallbacks


@ALL
def test_at_start_the_native_search_answers(
    published: Published,
    damage: Damage,
    message: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(published.publish("v1"))
    router = published.router()
    assert not router.learned
    assert_native(router, "bundle: BundleUnsigned")
    (line,) = logged(caplog)
    assert "No bundle serves 'docs'" in line
    assert "/v1 " in line
    assert message in line
    assert written(capfd) == ""


@ALL
def test_on_a_hot_swap_the_running_version_serves_on(
    published: Published, damage: Damage, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = published.router()
    before = [list(hits) for hits in router.search(QUERIES, k=5, n_probes=3)]
    damage(published.publish("v1"))
    for _ in range(2):
        assert not router.refresh()
    assert_serves(router, "v0")
    assert [list(hits) for hits in router.search(QUERIES, k=5, n_probes=3)] == before
    (line,) = logged(caplog)
    assert "The bundle that runs serves 'docs' on" in line
    assert "/v1 " in line
    assert message in line


@SOME
@pytest.mark.parametrize("how", ["roll back", "pin"])
def test_a_version_that_serves_again_is_checked_again(
    published: Published, damage: Damage, message: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = published.publish("v1")
    published.publish("v2")
    router = published.router()
    assert_serves(router, "v2")
    damage(home)
    if how == "roll back":
        assert published.registry.roll_back(KEY) == "v1"
    else:
        published.registry.pin(KEY, "v1")
    assert not router.refresh()
    assert_serves(router, "v2")
    (line,) = logged(caplog)
    assert message in line
    fresh = published.router()
    assert_native(fresh, "bundle: BundleUnsigned")


@SOME
def test_the_older_version_whose_cells_the_collection_has(
    published: Published, damage: Damage, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = published.router()
    published.publish("v1", change=other_cells)  # waits until the collection has its cells
    assert serving_bundle(router.collection, published.registry).manifest.version == "v0"
    damage(Path(published.registry._home(KEY)) / "v0")
    assert not router.refresh()
    assert_serves(router, "v0")
    fresh = LearnedRouter(router.collection, registry=published.registry, refresh=None)
    assert_native(fresh, "bundle: BundleUnsigned")
    lines = logged(caplog)
    assert len(lines) == 2
    assert all(message in line and "/v0 " in line for line in lines)


def test_a_signature_that_comes_later_is_taken(published: Published) -> None:
    router = published.router()
    folder = published.publish("v1")
    (folder / SIGNATURE).unlink()
    assert not router.refresh()
    assert_serves(router, "v0")
    published.registry.publish(published.folder / "v1")
    assert router.refresh()
    assert_serves(router, "v1")


def test_a_file_behind_a_sound_signature_is_still_checked(
    published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    router = published.router()
    folder = published.publish("v1")
    (folder / MODEL).write_bytes(b"other")
    assert not router.refresh()
    assert_serves(router, "v0")
    assert "checksum differs" in logged(caplog)[0]


def test_a_public_key_that_is_gone(
    published: Published, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What cannot be checked is refused; what was checked serves on."""
    trusted = Path(shutil.copy(published.key[1], tmp_path / "trusted.pub"))
    published.registry = Registry(published.registry.root, require_signature=trusted)
    router = published.router()
    published.publish("v1")
    trusted.unlink()
    assert not router.refresh()
    assert_serves(router, "v0")
    assert "No such file" in logged(caplog)[0]
    assert_native(published.router(), "bundle: BundleUnsigned")
    shutil.copy(published.key[1], trusted)
    assert router.refresh()
    assert_serves(router, "v1")


def test_the_policy_of_the_environment_reaches_a_router(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that names a registry only, and nothing of signatures."""
    root = published.registry.root
    (published.publish("v1") / SIGNATURE).unlink()
    collection = laid_out(published.folder / "v0")
    assert LearnedRouter(collection, registry=root, refresh=None).learned
    monkeypatch.setenv("AMIPS_REQUIRE_SIGNATURE", str(published.key[1]))
    router = LearnedRouter(collection, registry=root, refresh=None)
    assert_native(router, "bundle: BundleUnsigned")
