"""Any bytes in place of a bundle's: refused in the package's own words, or served, and no more.

``AMIPS_FUZZ`` says how many inputs in all; the nightly run takes 100,000.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amips_plugins.arrays import read_npy
from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    REFERENCE,
)
from amips_plugins.bundle.identity import check_bundle
from amips_plugins.bundle.loading import known_cells, load_hook, load_reference
from amips_plugins.bundle.manifest import MANIFEST, describe_file
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.registry import Registry
from amips_plugins.collection import collection_key
from amips_plugins.errors import BundleCorrupt, BundleError
from amips_plugins.export.nets import KeyNet, LinearRouter, SupportNet
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.health.drift import compare
from amips_plugins.models.hooks import ModelFault
from amips_plugins.models.onnx_check import OPERATORS, check_onnx
from amips_plugins.plan import Target
from amips_plugins.vectors import Metric
from tests.support.bundles import DIM, N_CELLS, make_files, memory, vectors, write_bundle
from tests.support.terminal import written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
INPUTS = int(os.environ.get("AMIPS_FUZZ", "3000"))
SLOWEST = 5.0  # seconds for one input, which takes about a millisecond
QUERIES = vectors(seed=5, count=3)

TOKENS = [b"\x00", b"\xff", b"\x80" * 10, b"\xff" * 9 + b"\x01", b"{", b"[", b'"', b"1e999", b"-1"]


@functools.cache
def valid(name: str) -> bytes:
    if name == MANIFEST:
        with tempfile.TemporaryDirectory() as folder:
            return (write_bundle(Path(folder)) / MANIFEST).read_bytes()
    if name == "supportnet":
        plain = Order(1.0, np.zeros(N_CELLS, dtype=np.float32))
        return to_onnx(SupportNet(DIM, N_CELLS, 5, 2), DIM, Metric.COSINE, plain)
    if name == "int8":
        net, order = LinearRouter(DIM, N_CELLS), Order(1.0, np.zeros(N_CELLS, dtype=np.float32))
        return to_onnx(net, DIM, Metric.COSINE, order, int8=True)
    if name == "keynet":
        return to_onnx(KeyNet(DIM), DIM, Metric.COSINE)
    return make_files()[name]


@st.composite
def mutations(draw: st.DrawFn, name: str) -> bytes:
    """A few changes of a valid file: bytes set, cut out, repeated, put in from elsewhere."""
    data = bytearray(valid(name))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 40]))
        kind = draw(st.sampled_from(["set", "cut", "repeat", "token", "move", "end"]))
        if kind == "set":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif kind == "token":
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == "move":
            start = draw(st.integers(0, max(0, len(data) - 1)))
            data[at:at] = data[start : start + length]
        else:
            del data[at:]
    return bytes(data)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    return st.one_of(mutations(name), mutations(name), st.binary(max_size=300))


def fuzz(name: str, share: float) -> Callable[[Callable[[bytes], None]], Callable[[], None]]:
    """Run a test on its share of the inputs; the folder it starts in stays as it was."""

    def decorate(test: Callable[[bytes], None]) -> Callable[[], None]:
        @settings(
            max_examples=max(1, int(INPUTS * share)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(data=inputs(name))
        def run(data: bytes) -> None:
            started = time.monotonic()
            test(data)
            assert time.monotonic() - started < SLOWEST

        run.__name__ = test.__name__
        return run

    return decorate


@pytest.fixture(autouse=True)
def nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """Neither files where the program runs nor beside them, nor text to the terminal."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    yield
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", inside]
    assert written(capfd) == ""


def opened(changed: str, data: bytes) -> Bundle:
    """A bundle of which one file is other than it was, and its manifest says so."""
    files = {**make_files(), changed: data} if changed != MANIFEST else make_files()
    manifest = valid(MANIFEST)
    if changed != MANIFEST:
        content = json.loads(manifest)
        content["files"][changed] = msgspec.to_builtins(describe_file(data))
        manifest = json.dumps(content).encode()
    files[MANIFEST] = data if changed == MANIFEST else manifest

    def fetch(name: str, limit: int) -> bytes:
        if name not in files:
            raise FileNotFoundError(name)
        return files[name][: limit + 1]

    return Bundle.open("here", fetch)


def load(changed: str, data: bytes) -> None:
    """Refused in the package's words, or it plans for queries, or gives what is no plan."""
    try:
        bundle = opened(changed, data)
        hook = load_hook(bundle)
    except BundleError:
        return
    if bundle.manifest.dim == DIM:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # of weights like 1e38
                plan = hook.plan(QUERIES, Target(k=3, n_probes=2))
        except ModelFault:  # the router answers natively
            return
        assert plan.cells is None or plan.cells.shape == (len(QUERIES), 2)


@fuzz(MANIFEST, 0.3)
def test_manifest(data: bytes) -> None:
    load(MANIFEST, data)


@fuzz(CELLS, 0.1)
def test_cells(data: bytes) -> None:
    load(CELLS, data)


@fuzz(CALIBRATION, 0.1)
def test_calibration(data: bytes) -> None:
    load(CALIBRATION, data)


@fuzz(IDS, 0.05)
def test_ids(data: bytes) -> None:
    _known(IDS, data)


@fuzz(KNOWN_CELLS, 0.05)
def test_known_cells(data: bytes) -> None:
    _known(KNOWN_CELLS, data)


def _known(changed: str, data: bytes) -> None:
    try:
        assign = known_cells(opened(changed, data))
    except BundleError:
        return
    assert set(assign([0, 1, 2], QUERIES).tolist()) <= set(range(N_CELLS))


@fuzz(REFERENCE, 0.05)
def test_reference(data: bytes) -> None:
    try:
        reference = load_reference(opened(REFERENCE, data))
    except BundleError:
        return
    assert reference is not None
    with np.errstate(over="ignore"):  # of numbers like 1e38
        assert 0.0 <= compare(reference, np.ones((5, N_CELLS), np.float32)).p_value <= 1.0


@fuzz(KEY_SAMPLE, 0.05)
def test_key_sample(data: bytes) -> None:
    try:
        check_bundle(memory(), opened(KEY_SAMPLE, data))
    except BundleError:
        return
    assert data != b"[]"


@fuzz(KNOWN_CELLS, 0.05)
def test_array(data: bytes) -> None:
    try:
        array = read_npy(data)
    except ValueError:
        return
    assert array.nbytes <= len(data)


@fuzz("int8", 0.05)
def test_int8(data: bytes) -> None:
    _model(data)


@fuzz("supportnet", 0.05)
def test_supportnet(data: bytes) -> None:
    _model(data)


@fuzz("keynet", 0.05)
def test_keynet(data: bytes) -> None:
    _model(data)


@fuzz(MODEL, 0.2)
def test_model(data: bytes) -> None:
    load(MODEL, data)
    _agree(data)


def _agree(data: bytes) -> None:
    """What the check lets pass is for a full protobuf parser the same harmless model."""
    try:
        check_onnx(data)
    except BundleCorrupt:
        return
    model = onnx.load_from_string(data)
    assert not model.functions
    assert not model.training_info
    assert {node.op_type for node in model.graph.node} <= set(OPERATORS)
    assert not any(node.domain for node in model.graph.node)
    assert not any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert len(model.SerializeToString()) == len(data)  # nothing was skipped or merged


def _model(data: bytes) -> None:
    from amips_plugins.models.onnx_session import OnnxModel

    _agree(data)
    try:
        model = OnnxModel(data)
    except BundleError:
        return
    (dim,) = (shape[-1] for shape in model.inputs.values())
    if dim <= 1000:
        outputs = model.run(list(model.outputs), {"queries": np.ones((2, dim), np.float32)})
        assert [output.shape[-1] for output in outputs] == [
            shape[-1] for shape in model.outputs.values()
        ]


@pytest.mark.parametrize("share", [0.02])
def test_registry_reads_and_writes_in_its_folder_only(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    """Publishing and opening what any manifest names leaves no file outside the registry."""
    base = tmp_path_factory.mktemp("fuzz")
    made = base / "made"
    made.mkdir()
    for name, content in make_files().items():
        (made / name).write_bytes(content)
    before = sorted(base.iterdir())
    registry = Registry(base / "registry")
    names = st.sampled_from(["..", "../x", "/", "/etc", "a/b", "%2E", "\x00", "é", "x", "CON"])

    @settings(
        max_examples=max(1, int(INPUTS * share)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(names, names | st.text(max_size=5), names, inputs(MANIFEST))
    def publish(version: str, collection: str, file: str, raw: bytes) -> None:
        content = json.loads(valid(MANIFEST))
        content["version"] = version
        content["collection"]["name"] = collection
        content["files"][file] = {"sha256": "", "bytes": 0}
        if version == "x":
            content["files"].pop(file)
        for manifest in (json.dumps(content).encode(), raw):
            (made / MANIFEST).write_bytes(manifest)
            try:
                registry.publish(made)
            except (BundleError, ValueError):
                continue
        try:
            registry.open(collection_key(memory().info), version)
        except BundleError:
            return

    publish()
    outside = {path for path in base.iterdir() if path not in before}
    assert outside <= {base / "registry"}
    assert not [p for p in (base / "registry").rglob("*") if p.is_symlink()]
