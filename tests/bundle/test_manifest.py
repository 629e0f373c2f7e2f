from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.bundle.contents import CELLS, MODEL
from amips_plugins.bundle.manifest import MANIFEST, describe_file
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import collection_key
from amips_plugins.errors import BundleCorrupt, BundleMismatch, BundleNotFound
from amips_plugins.vectors import Metric
from tests.support.bundles import make_files, memory, open_bundle, write_bundle

FILES = sorted(make_files())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Alter the manifest as JSON."""
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_every_file_reads_back(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert {name: bundle.read(name) for name in bundle.manifest.files} == make_files()


def test_opening_touches_the_manifest_only(folder: Path) -> None:
    fetched = []

    def fetch(name: str, limit: int) -> bytes:  # noqa: ARG001 - it is far below
        fetched.append(name)
        return (folder / name).read_bytes()

    Bundle.open("here", fetch)
    assert fetched == [MANIFEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_refused(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleCorrupt, match=f"{name} .* checksum differs"):
        open_bundle(folder).read(name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda _: b"", lambda d: d + b"\0"])
def test_another_length_is_refused(
    folder: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(BundleCorrupt, match="publish it again"):
        open_bundle(folder).read(name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleCorrupt, match=f"{name} is missing"):
        open_bundle(folder).read(name)


def test_a_file_the_manifest_does_not_name(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(BundleCorrupt, match=r"has no file 'extra\.bin'"):
        open_bundle(folder).read("extra.bin")


@pytest.mark.parametrize(
    "name",
    ["../model.onnx", "/etc/hostname", "a/b", "..", ".", "", "a/", "manifest.json", "../../x"],
)
def test_file_names_with_path_parts_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda c: c["files"].update({name: {"sha256": "0", "bytes": 1}}))
    with pytest.raises(BundleCorrupt, match="names the file"):
        open_bundle(folder)


@pytest.mark.parametrize("version", ["..", "../x", "a/b", "", ".", "latest.json", "v 1", "é", "-"])
def test_a_version_is_a_plain_name(folder: Path, version: str) -> None:
    edit(folder, lambda c: c.update(version=version))
    with pytest.raises(BundleCorrupt, match="has the version"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("format_", "do"),
    [(0, "train again"), (1, "train again"), (3, "upgrade the package"), (99, "upgrade")],
)
def test_another_format_says_what_to_do(folder: Path, format_: int, do: str) -> None:
    # A newer format may have any fields.
    (folder / MANIFEST).write_text(json.dumps({"format": format_, "something": "new"}))
    with pytest.raises(BundleCorrupt, match=f"format {format_}.* {do}"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(surprise=1),
        lambda c: c["collection"].update(surprise=1),
        lambda c: c["files"][MODEL].update(surprise=1),
        lambda c: c.pop("metric"),
        lambda c: c.update(metric="hamming"),
        lambda c: c.update(model="pickle"),
        lambda c: c.update(dim="4"),
        lambda c: c.update(format="1"),
        lambda c: c.pop("format"),
    ],
)
def test_a_manifest_of_another_form_is_refused(folder: Path, change: Callable[[Any], None]) -> None:
    edit(folder, change)
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        open_bundle(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"format: 1"])
def test_a_manifest_that_is_no_json_object(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        open_bundle(folder)


@pytest.mark.parametrize("there", ["nowhere", "empty", "file"])
def test_no_bundle_at_the_location(tmp_path: Path, there: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleNotFound, match="There is no bundle at"):
        open_bundle(tmp_path / there)
    with pytest.raises(BundleNotFound):
        LearnedRouter(memory(), bundle=tmp_path / there)


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("collection", {"database": "milvus"}),
        ("collection", {"namespace": "tenant"}),
        ("collection", {"name": "other"}),
        ("collection", {"field": "title"}),
        ("metric", {"metric": Metric.L2}),
        ("dimension", {"dim": 8}),
    ],
)
def test_another_collection_is_refused_by_name(
    folder: Path, what: str, given: dict[str, Any]
) -> None:
    manifest = open_bundle(folder).manifest
    own, metric, dim = collection_key(memory().info), given.pop("metric", Metric.COSINE), 4
    manifest.check_serves(own, Metric.COSINE, dim)
    dim = given.pop("dim", dim)
    with pytest.raises(BundleMismatch, match=f"v1 was made for {what} .* not .*; train one"):
        manifest.check_serves(msgspec.structs.replace(own, **given), metric, dim)


def test_describing_a_file() -> None:
    entry = describe_file(b"abc")
    assert entry.bytes == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_manifest_may_not_drop_what_the_model_needs(folder: Path) -> None:
    edit(folder, lambda c: c["files"].pop(CELLS))
    with pytest.raises(BundleCorrupt, match=f"has no file '{CELLS}'"):
        LearnedRouter(memory(), bundle=folder)
