from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest

from amips_plugins import Registry
from amips_plugins.bundle.contents import CALIBRATION, CELLS, KNOWN_CELLS, MODEL
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.bundle.registry import default_registry
from amips_plugins.collection import CollectionKey, collection_key
from amips_plugins.errors import BundleCorrupt, BundleNotFound, InvalidInput
from tests.support.bundles import make_files, memory, write_bundle

KEY = collection_key(memory().info)
MARKS = ("first.txt", "last.txt")  # what a service does not read: the others have to load
FILES = {*make_files(), *MARKS}
WRITES = len(FILES) + 2  # and the manifest, and latest.json


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "registry")
        return
    path = f"memory://{uuid.uuid4().hex}"
    yield path
    files = fsspec.filesystem("memory")
    if files.exists(path):
        files.rm(path, recursive=True)


@pytest.fixture
def registry(root: str) -> Registry:
    return Registry(root)


def make(folder: Path, version: str, **changes: Any) -> Path:
    """A bundle whose first and last files are its version, so that a mix of two shows."""

    def mark(files: dict[str, bytes]) -> None:
        first, last = MARKS
        between = dict(files)
        files.clear()
        files.update({first: version.encode(), **between, last: version.encode()})

    return write_bundle(folder / version, version=version, change=mark, **changes)


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[..., str]:
    def publish(version: str, **changes: Any) -> str:
        return registry.publish(make(tmp_path / "made", version, **changes))

    return publish


Publish = Callable[..., str]


def read_all(registry: Registry) -> str:
    """Read every file of what serves and return its version; a mix of versions fails."""
    bundle = registry.open(KEY)
    version = bundle.manifest.version
    for name in bundle.manifest.files:
        data = bundle.read(name)
        assert name not in MARKS or data == version.encode()
    return version


def test_an_empty_registry(registry: Registry) -> None:
    assert registry.versions(KEY) == []
    assert registry.current(KEY) is None
    assert not registry.pinned(KEY)
    with pytest.raises(BundleNotFound, match=r"no bundle for memory collection 'docs'.*publish"):
        registry.open(KEY)
    with pytest.raises(BundleNotFound):
        registry.unpin(KEY)
    with pytest.raises(BundleNotFound, match="nothing to roll back"):
        registry.roll_back(KEY)
    with pytest.raises(BundleNotFound, match="there are: none"):
        registry.pin(KEY, "v1")


def test_the_newest_serves(registry: Registry, publish: Publish, root: str) -> None:
    assert publish("v1") == "v1"
    publish("v2")
    assert registry.versions(KEY) == ["v1", "v2"]
    assert registry.current(KEY) == "v2"
    assert read_all(registry) == "v2"
    assert read_all(Registry(root)) == "v2"
    assert registry.open(KEY, "v1").manifest.version == "v1"
    with pytest.raises(BundleNotFound):
        registry.open(KEY, "v3")


def test_a_pinned_version_is_held(registry: Registry, publish: Publish) -> None:
    publish("v1")
    publish("v2")
    registry.pin(KEY, "v1")
    publish("v3")
    assert registry.pinned(KEY)
    assert registry.current(KEY) == "v1"
    assert registry.unpin(KEY) == "v3"
    assert registry.current(KEY) == "v3"
    assert not registry.pinned(KEY)
    publish("v4")
    assert registry.current(KEY) == "v4"


def test_pinning_an_unknown_version_names_those_there_are(
    registry: Registry, publish: Publish
) -> None:
    publish("v1")
    publish("v2")
    with pytest.raises(BundleNotFound, match=r"no version 'v9'.* there are: v1, v2"):
        registry.pin(KEY, "v9")
    assert registry.current(KEY) == "v2"


def test_rolling_back_step_by_step(registry: Registry, publish: Publish) -> None:
    for version in ("v1", "v2", "v3"):
        publish(version)
    assert registry.roll_back(KEY) == "v2"
    assert registry.roll_back(KEY) == "v1"
    assert read_all(registry) == "v1"
    with pytest.raises(BundleNotFound, match="nothing to roll back"):
        registry.roll_back(KEY)
    publish("v4")
    assert registry.roll_back(KEY) == "v1"


def spoil(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[name] = b"\x00" * 64  # with a checksum that says so

    return change


@pytest.mark.parametrize("name", [MODEL, CELLS, CALIBRATION, KNOWN_CELLS])
def test_what_could_not_serve_is_not_published(
    registry: Registry, publish: Publish, tmp_path: Path, name: str
) -> None:
    publish("v1")
    written = Path(registry.root) if registry._local else None
    before = None if written is None else sorted(written.rglob("*"))
    with pytest.raises(BundleCorrupt):
        registry.publish(write_bundle(tmp_path / "bad", version="v2", change=spoil(name)))
    assert registry.versions(KEY) == ["v1"]
    assert registry.current(KEY) == "v1"
    assert written is None or sorted(written.rglob("*")) == before


def test_a_model_of_another_dimension_is_not_published(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(BundleCorrupt, match="not what a linear must"):
        registry.publish(write_bundle(tmp_path / "bad", dim=5))
    assert registry.versions(KEY) == []


def test_a_keynet_has_no_cells_to_check(registry: Registry, tmp_path: Path) -> None:
    assert registry.publish(write_bundle(tmp_path / "made", model="keynet")) == "v1"


def test_a_damaged_bundle_is_not_published(registry: Registry, tmp_path: Path) -> None:
    folder = make(tmp_path, "v1")
    (folder / MODEL).write_bytes(b"other")
    with pytest.raises(BundleCorrupt, match="checksum"):
        registry.publish(folder)
    with pytest.raises(BundleNotFound):
        registry.publish(tmp_path / "nowhere")
    assert registry.versions(KEY) == []
    assert registry.current(KEY) is None


@pytest.mark.parametrize("whole", range(WRITES))
def test_a_publish_killed_midway_leaves_the_old_version(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    publish("v1")
    written: list[str] = []
    write = Registry._write

    def dying(self: Registry, path: str, data: bytes) -> None:
        if len(written) == whole:
            raise KeyboardInterrupt
        written.append(path)
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            publish("v2")
    assert len(written) == whole
    assert read_all(registry) == "v1"
    complete = whole > len(FILES)
    assert registry.versions(KEY) == (["v1", "v2"] if complete else ["v1"])
    assert publish("v2") == "v2"  # the same call again finishes the job
    assert read_all(registry) == "v2"
    assert registry.versions(KEY) == ["v1", "v2"]
    assert registry.roll_back(KEY) == "v1"


def unserved(registry: Registry, publish: Publish, version: str, **changes: Any) -> None:
    """Publish a version, and die before the pointer names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "_point", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(version, **changes)
    assert version in registry.versions(KEY)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("earlier", [["v1"], []])
def test_a_complete_version_that_never_served_is_finished(
    registry: Registry, publish: Publish, earlier: list[str]
) -> None:
    for version in earlier:
        publish(version)
    unserved(registry, publish, "v2")
    assert registry.current(KEY) == (earlier[-1] if earlier else None)
    assert publish("v2") == "v2"
    assert read_all(registry) == "v2"


def test_other_content_under_a_name_that_is_taken_is_refused(
    registry: Registry, publish: Publish
) -> None:
    publish("v1")
    unserved(registry, publish, "v2")
    with pytest.raises(InvalidInput, match="another bundle as version v2"):
        publish("v2", reason="another training")
    assert read_all(registry) == "v1"
    assert registry.open(KEY, "v2").manifest.reason == "made by hand"


def test_publishing_again_serves_unless_pinned(registry: Registry, publish: Publish) -> None:
    publish("v1")
    publish("v2")
    before = registry.roll_back(KEY)
    assert (before, publish("v2"), registry.current(KEY)) == ("v1", "v2", "v2")
    assert (publish("v2"), registry.current(KEY)) == ("v2", "v2")
    registry.pin(KEY, "v1")
    assert (publish("v2"), registry.current(KEY)) == ("v2", "v1")
    assert registry.versions(KEY) == ["v1", "v2"]


def test_the_manifest_is_written_last_and_the_pointer_after_it(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Registry._write

    def watched(self: Registry, path: str, data: bytes) -> None:
        written.append(path.rpartition("/")[2])
        write(self, path, data)

    monkeypatch.setattr(Registry, "_write", watched)
    publish("v1")
    assert sorted(written[:-2]) == sorted(FILES)
    assert written[-2:] == [MANIFEST, "latest.json"]


def watch(root: str, done: threading.Event, seen: list[str], errors: list[BaseException]) -> None:
    registry = Registry(root)
    try:
        while not done.wait(0.001):  # lets the writer have its turn
            seen.append(read_all(registry))
    except BaseException as exc:  # noqa: BLE001 - the main thread shows it
        errors.append(exc)


def publish_under_readers(root: str, publish_all: Callable[[], None]) -> list[list[str]]:
    done, errors = threading.Event(), list[BaseException]()
    seen: list[list[str]] = [[] for _ in range(4)]
    readers = [threading.Thread(target=watch, args=(root, done, log, errors)) for log in seen]
    for reader in readers:
        reader.start()
    try:
        publish_all()
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert errors == []
    return seen


PUBLISHER = """
import sys
from amips_plugins import Registry
registry = Registry(sys.argv[1])
for folder in sys.argv[2:]:
    registry.publish(folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("publisher", ["process", "thread"])
def test_readers_never_see_half_of_a_version(root: str, tmp_path: Path, publisher: str) -> None:
    if publisher == "process" and root.startswith("memory:"):
        pytest.skip("memory:// lives in one process")
    folders = [make(tmp_path, f"v{number:02}") for number in range(31)]
    Registry(root).publish(folders[0])

    def in_this_process() -> None:
        for folder in folders[1:]:
            Registry(root).publish(folder)

    def in_another() -> None:
        command = [sys.executable, "-c", PUBLISHER, root, *map(str, folders[1:])]
        subprocess.run(command, check=True, timeout=120)  # noqa: S603 - our own interpreter

    seen = publish_under_readers(root, in_another if publisher == "process" else in_this_process)
    assert Registry(root).current(KEY) == "v30"
    assert len(Registry(root).versions(KEY)) == 31
    for log in seen:
        assert log == sorted(log)  # time never runs backwards
    assert len(set().union(*seen)) > 1  # they did read while it was published


def test_two_publishers_at_once(root: str, tmp_path: Path) -> None:
    sides = [[make(tmp_path, f"{side}{number:02}") for number in range(10)] for side in ("a", "b")]
    errors: list[BaseException] = []

    def publish(folders: list[Path]) -> None:
        try:
            for folder in folders:
                Registry(root).publish(folder)
        except BaseException as exc:  # noqa: BLE001 - the main thread shows it
            errors.append(exc)

    threads = [threading.Thread(target=publish, args=(folders,)) for folders in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registry = Registry(root)
    assert errors == []
    assert len(registry.versions(KEY)) == 20
    assert registry.current(KEY) in ("a09", "b09")
    read_all(registry)
    assert registry.roll_back(KEY) in registry.versions(KEY)


def history(root: Path) -> list[str]:
    """The versions that served, in their order."""
    latest = json.loads((Path(Registry(root)._home(KEY)) / "latest.json").read_bytes())
    return [*latest["previous"], latest["version"]]


@pytest.mark.parametrize("second", ["publish", "pin", "roll_back"])
@pytest.mark.slow
def test_a_writer_waits_for_another_that_has_read_the_pointer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    root = tmp_path / "registry"
    made = {version: make(tmp_path / "made", version) for version in ("v1", "v2", "v3", "v4")}
    for version in ("v1", "v2"):
        Registry(root).publish(made[version])
    calls: dict[str, Callable[[], object]] = {
        "publish": lambda: Registry(root).publish(made["v4"]),
        "pin": lambda: Registry(root).pin(KEY, "v1"),
        "roll_back": lambda: Registry(root).roll_back(KEY),
    }
    other = threading.Thread(target=calls[second])
    store = Registry._store

    def meanwhile(self: Registry, *arguments: Any) -> None:
        if threading.current_thread() is not other:
            other.start()
            other.join(1.0)  # time enough for it to write, if nothing kept it from doing so
        store(self, *arguments)

    monkeypatch.setattr(Registry, "_store", meanwhile)
    Registry(root).publish(made["v3"])
    other.join()
    expected = {
        "publish": ["v1", "v2", "v3", "v4"],
        "pin": ["v1", "v2", "v3", "v1"],
        "roll_back": ["v1", "v2"],
    }
    assert history(root) == expected[second]
    assert Registry(root).pinned(KEY) == (second == "pin")


PINNER = """
import sys
from amips_plugins import Registry
from amips_plugins.collection import CollectionKey
root, *name = sys.argv[1:5]
key = CollectionKey(database=name[0], name=name[1], field=name[2])
registry = Registry(root)
for version in sys.argv[5:]:
    registry.pin(key, version)
"""


@pytest.mark.slow
def test_no_history_is_lost_among_processes(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(make(tmp_path, "v0"))
    home = Path(registry._home(KEY))
    shares = [[f"{side}{number:02}" for number in range(10)] for side in "abcd"]
    versions = [version for share in shares for version in share]
    for version in versions:
        (home / version).mkdir()
        (home / version / MANIFEST).write_bytes(b"{}")  # enough to be pinned
    name = [KEY.database, KEY.name, KEY.field]
    commands = [[sys.executable, "-c", PINNER, registry.root, *name, *share] for share in shares]
    pinners = [subprocess.Popen(command) for command in commands]  # noqa: S603 - our own interpreter
    assert [pinner.wait(120) for pinner in pinners] == [0, 0, 0, 0]
    served = history(tmp_path / "registry")
    assert sorted(served) == sorted(["v0", *versions])
    for share in shares:
        assert [version for version in served if version in share] == share


def test_a_version_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for version in ("v1", "v2"):
        registry.publish(make(tmp_path / "made", version))
    home = Path(registry._home(KEY))
    shutil.rmtree(home / "v2")
    shutil.copytree(home / "v1", home / "v2")
    with pytest.raises(BundleCorrupt, match="v2 is version v1; publish it again"):
        registry.open(KEY)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 3}', b"\xff", b'{"version'])
def test_a_damaged_pointer_is_corrupt_until_a_version_is_pinned(
    registry: Registry, publish: Publish, content: bytes
) -> None:
    publish("v1")
    publish("v2")
    registry._fs.pipe_file(f"{registry._home(KEY)}/latest.json", content)
    for call in (registry.open, registry.current, registry.pinned, registry.roll_back):
        with pytest.raises(BundleCorrupt, match="pin a version to mend it"):
            call(KEY)
    assert registry.versions(KEY) == ["v1", "v2"]
    registry.pin(KEY, "v1")
    assert read_all(registry) == "v1"
    assert registry.unpin(KEY) == "v2"


@pytest.mark.parametrize("version", ["../../../outside", "..", "/", "v9"])
def test_a_pointer_cannot_lead_out_of_the_registry(
    registry: Registry, publish: Publish, version: str
) -> None:
    publish("v1")
    content = f'{{"version": "{version}"}}'.encode()
    registry._fs.pipe_file(f"{registry._home(KEY)}/latest.json", content)
    with pytest.raises(BundleNotFound):
        registry.open(KEY)


NAMES = [
    "..",
    ".",
    "...",
    "../../outside",
    "/etc/docs",
    "a/b",
    "a\\b",
    "docs.v1",
    "dócs 文書",
    "a%2Fb",
    "%2E%2E",
    "a b?c#d",
    "x\ny",
    "",
    "unnamed",
    "%unnamed",
    "%",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "in" / "registry")
    made = make(tmp_path / "made", "v1")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for place in ("database", "name", "field"):
        parts = {"database": "memory", "name": "docs", "field": "vector"} | {place: name}
        key = CollectionKey(**parts)
        folder = write_bundle(tmp_path / "made" / place, version="v1", collection=key)
        registry.publish(folder)
        assert registry.open(key).manifest.collection == key
        assert registry.versions(key) == ["v1"]
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    outside = [path for path in new if not path.is_relative_to(tmp_path / "in" / "registry")]
    assert all(path.is_relative_to(tmp_path / "made") for path in outside)
    assert made.exists()
    for path in new - set(outside):  # <database>/<collection>/<field>/[<version>/]<file>
        assert len(path.relative_to(tmp_path / "in" / "registry").parts) in (4, 5)


def test_different_names_have_different_homes(registry: Registry) -> None:
    keys = [CollectionKey(database="milvus", name=name, field="v") for name in NAMES]
    assert len({registry._home(key) for key in keys}) == len(NAMES)


def test_collections_do_not_meet(registry: Registry, publish: Publish) -> None:
    other = CollectionKey(database="memory", name="other", field="vector")
    publish("v1")
    publish("v2", collection=other)
    assert registry.current(KEY) == "v1"
    assert registry.current(other) == "v2"
    assert registry.versions(other) == ["v2"]


def test_a_collection_has_the_key_that_its_adapter_says() -> None:
    info = memory(name="docs__g2").info
    assert collection_key(info).name == "docs__g2"
    assert collection_key(replace(info, family="docs")) == KEY
    assert collection_key(replace(info, namespace="tenant")).namespace == "tenant"


def test_collections_of_one_name_in_two_databases_do_not_meet(
    registry: Registry, publish: Publish
) -> None:
    other = msgspec.structs.replace(KEY, namespace="tenant")
    publish("v1")
    publish("v2", collection=other)
    assert (registry.current(KEY), registry.current(other)) == ("v1", "v2")
    odd = msgspec.structs.replace(KEY, database="memory@tenant")
    assert registry.current(odd) is None


def test_the_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    assert default_registry() == "registry"
    monkeypatch.setenv("AMIPS_REGISTRY", str(tmp_path))
    assert Registry().root == str(tmp_path)


def test_an_unknown_protocol_is_one_clear_sentence() -> None:
    with pytest.raises(InvalidInput, match="nosuch://models' cannot be opened"):
        Registry("nosuch://models")


def test_opening_a_registry_writes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.versions(KEY)
    registry.current(KEY)
    assert not (tmp_path / "registry").exists()


def test_publishing_leaves_no_temporary_files(tmp_path: Path) -> None:
    Registry(tmp_path / "registry").publish(make(tmp_path, "v1"))
    names = {path.name for path in (tmp_path / "registry").rglob("*") if path.is_file()}
    assert names == {*FILES, MANIFEST, "latest.json", ".lock"}


@pytest.mark.parametrize("url", ["ftp://user:secret@host/models", "s3://key:secret@bucket"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput, match="Credentials do not belong") as caught:
        Registry(url)
    assert "secret" not in str(caught.value)
