"""Every bad bundle: refused by name, and the router answers as before."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from amips_plugins import LearnedRouter, Registry
from amips_plugins.bundle.contents import CALIBRATION, CELLS, GOLDEN_OUTPUTS, KEY_SAMPLE, MODEL
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.collection import collection_key
from tests.support.bundles import DIM, N_CELLS, laid_out, make_files, memory, write_bundle
from tests.support.routing_data import QUERIES, assert_native, logged
from tests.support.terminal import written

Damage = Callable[[Path], None]


def alter_manifest(change: Callable[[Any], None]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_bytes())
        change(content)
        (folder / MANIFEST).write_text(json.dumps(content))

    return damage


def replace(name: str, data: Callable[[bytes], bytes]) -> Damage:
    """Replace a file and its entry in the manifest: only what the file holds is wrong."""

    def damage(folder: Path) -> None:
        new = data((folder / name).read_bytes())
        (folder / name).write_bytes(new)
        entry = {"sha256": hashlib.sha256(new).hexdigest(), "bytes": len(new)}
        alter_manifest(lambda c: c["files"].update({name: entry}))(folder)

    return damage


def on_disk(name: str, data: Callable[[bytes], bytes]) -> Damage:
    """Replace a file behind the manifest's back."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data((folder / name).read_bytes()))

    return damage


def model(change: Callable[[Any], None]) -> Damage:
    def alter(data: bytes) -> bytes:
        proto = onnx.load_from_string(data)
        change(proto)
        altered: bytes = proto.SerializeToString()
        return altered

    return replace(MODEL, alter)


# What may be wrong with a model


def external(proto: Any) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"


def external_in_memory(proto: Any) -> None:
    """An address in the process, as ONNX Runtime marks its own tensors."""
    tensor = proto.graph.initializer[0]
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def operator(name: str, domain: str = "") -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.graph.node[-1].op_type = name
        proto.graph.node[-1].domain = domain

    return change


def subgraph(name: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        inner = helper.make_graph([], "inner", [], [])
        attribute = helper.make_attribute("then_branch" if name == "If" else "body", inner)
        proto.graph.node[0].op_type = name
        proto.graph.node[0].ClearField("attribute")
        proto.graph.node[0].attribute.append(attribute)

    return change


def function(proto: Any) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    opset = helper.make_opsetid("", 17)
    proto.functions.append(helper.make_function("own", "Relu", ["x"], ["y"], [node], [opset]))


def weight(value: float) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        matrix = next(t for t in proto.graph.initializer if len(t.dims) == 2)
        array = numpy_helper.to_array(matrix).copy()
        array.flat[3] = value
        matrix.raw_data = array.tobytes()

    return change


def dims(*sizes: int) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.graph.initializer[0].dims[:] = sizes

    return change


def emptied(*sizes: int) -> Callable[[Any], None]:
    """Sizes whose product is 0 in 64 bits, and no bytes."""

    def change(proto: Any) -> None:
        proto.graph.initializer[0].dims[:] = sizes
        proto.graph.initializer[0].raw_data = b""

    return change


def doubling(proto: Any) -> None:
    """Forty values, each of twice the columns of the one before: few bytes, much memory."""
    name = "queries"
    for step in range(40):
        proto.graph.node.insert(
            step, helper.make_node("Concat", [name, name], [f"wide{step}"], axis=1)
        )
        name = f"wide{step}"


def long_chain(proto: Any) -> None:
    for step in range(300):
        proto.graph.node.append(helper.make_node("Relu", ["queries"], [f"more{step}"]))


def many_fields(proto: Any) -> None:
    for step in range(20_000):
        proto.graph.node.append(helper.make_node("Relu", ["queries"], [f"more{step}"]))


def outer_product(proto: Any) -> None:
    """A matrix of queries by queries."""
    proto.graph.node.append(helper.make_node("Gemm", ["queries", "queries"], ["square"], transB=1))


def second_input(proto: Any) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", DIM]))


def input_of(shape: list[Any], kind: int = TensorProto.FLOAT) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("queries", kind, shape))

    return change


def output_of(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.graph.output[-1].CopyFrom(helper.make_tensor_value_info(name, kind, shape))

    return change


def sparse(proto: Any) -> None:
    proto.graph.sparse_initializer.add()


def training(proto: Any) -> None:
    proto.training_info.add()


def versions(opset: int, ir: int) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.opset_import[0].version, proto.ir_version = opset, ir

    return change


def second_domain(proto: Any) -> None:
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def attribute(proto: Any) -> None:
    """Gemm with an alpha: an operator that is allowed, in a way that is not."""
    node = next(node for node in proto.graph.node if node.op_type == "Gemm")
    node.attribute.append(helper.make_attribute("transA", 1))


def redefined(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("Relu", ["queries"], ["priority"]))


def dangling(proto: Any) -> None:
    proto.graph.node[-1].input[0] = "nothing"


def typed(proto: Any) -> None:
    proto.graph.initializer[0].data_type = TensorProto.DOUBLE


def unnormalised(data: bytes) -> bytes:
    """The first number of the file with a leading zero: the same to a lenient parser."""
    return data[:1] + bytes([data[1] | 0x80, 0]) + data[2:]


def second_graph(data: bytes) -> bytes:
    """Protobuf parsers merge a field that comes twice, or take the last."""
    proto = onnx.ModelProto()
    proto.graph.node.append(helper.make_node("Erf", ["queries"], ["x"]))
    more: bytes = proto.SerializeToString()
    return data + more


def ort_format(data: bytes) -> bytes:
    """ONNX Runtime's own format, which it takes for itself unless told not to."""
    path = Path(os.environ["TMPDIR_OF_TEST"]) / "model.ort"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return path.read_bytes()


MODELS: dict[str, tuple[Damage, str]] = {
    "external data outside": (model(external), "external data"),
    "external data in memory": (model(external_in_memory), "external data"),
    "forbidden operator": (model(operator("Erf")), "the operator 'Erf'"),
    "random operator": (model(operator("RandomNormalLike")), "'RandomNormalLike'"),
    "custom domain": (model(operator("Gelu", "com.microsoft")), "custom domain 'com.microsoft'"),
    "custom operator set": (model(second_domain), "custom domain 'com.microsoft'"),
    "If": (model(subgraph("If")), "a subgraph"),
    "Loop": (model(subgraph("Loop")), "a subgraph"),
    "function": (model(function), "functions of its own"),
    "NaN weight": (model(weight(np.nan)), "not finite"),
    "infinite weight": (model(weight(-np.inf)), "not finite"),
    "huge shape": (model(dims(1 << 40, 1 << 40)), "has the shape"),
    "shape that overflows": (model(emptied(1 << 32, 1 << 32)), "has the shape"),
    "shape that overflows within limits": (model(emptied(1 << 27, 1 << 27)), "0 bytes"),
    "negative shape": (model(dims(-1, -4)), "has the shape"),
    "rank 3": (model(dims(1, 1, DIM)), "has the shape"),
    "other shape": (model(dims(1, 7)), "bytes, and its shape"),
    "exponential width": (model(doubling), "more than 131072 columns"),
    "many nodes": (model(long_chain), "nodes, and 256 are the limit"),
    "many fields": (model(many_fields), "too many fields"),
    "queries by queries": (model(outer_product), "its Gemm takes"),
    "second input": (model(second_input), "its input is not"),
    "input of rank 3": (model(input_of(["n", DIM, 1])), "not a float matrix"),
    "input of fixed batch": (model(input_of([1, DIM])), "not a float matrix"),
    "input of doubles": (model(input_of(["n", DIM], TensorProto.DOUBLE)), "not a float matrix"),
    "other width": (model(input_of(["n", DIM + 1])), "takes the shapes"),
    "output of rank 1": (model(output_of("priority", ["n"])), "not a float matrix"),
    "output of integers": (
        model(output_of("priority", ["n", N_CELLS], TensorProto.INT64)),
        "not a float matrix",
    ),
    "output of other width": (model(output_of("priority", ["n", 99])), "that it declares"),
    "output of free width": (model(output_of("priority", ["n", "m"])), "not a float matrix"),
    "output of another name": (model(output_of("else", ["n", N_CELLS])), "that it declares"),
    "sparse initializers": (model(sparse), "sparse initializers"),
    "training steps": (model(training), "training steps"),
    "newer operator set": (model(versions(21, 8)), "operator set is 21"),
    "newer ir version": (model(versions(17, 99)), "ir_version is 99"),
    "attribute": (model(attribute), "attributes that are not allowed"),
    "value twice": (model(redefined), "'priority' twice"),
    "dangling input": (model(dangling), "'nothing', which nothing before it gives"),
    "weights of doubles": (model(typed), "neither float32 nor an integer of 8 or 64 bits"),
    "number of odd form": (replace(MODEL, unnormalised), "a number of odd form"),
    "graph twice": (replace(MODEL, second_graph), "the field graph twice"),
    "runtime's own format": (replace(MODEL, ort_format), "model is refused"),
    "no model": (replace(MODEL, lambda _: b"\x00" * 999), "model is refused"),
    "empty model": (replace(MODEL, lambda _: b""), "operator set is none"),
    "unknown field": (replace(MODEL, lambda d: d + b"\xf8\x07\x01"), "unknown field 127"),
}


# What may be wrong with the other files


def header(shape: str, descr: str = "'<f4'") -> Callable[[bytes], bytes]:
    """An array whose header says more than there is."""

    def alter(data: bytes) -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * ((54 - len(text)) % 64) + b"\n"
        fake = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        return rezipped(data, {0: fake})

    return alter


def rezipped(data: bytes, contents: dict[int, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for place, name in enumerate(old.namelist()):
            new.writestr(name, contents.get(place, old.read(name)))
    return buffer.getvalue()


def bomb(data: bytes) -> bytes:
    return rezipped(data, {0: b"\0" * (64 << 20)}, zipfile.ZIP_DEFLATED)


def pickled(data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return rezipped(data, {0: buffer.getvalue()})


def spoilt(name: str, value: float) -> Callable[[bytes], bytes]:
    def alter(data: bytes) -> bytes:
        arrays = dict(np.load(io.BytesIO(data)))
        arrays[name].flat[0] = value
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    return alter


def _archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def extra_array(data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(np.load(io.BytesIO(data))), more=np.zeros(1))
    return buffer.getvalue()


def other_weights(proto: Any) -> None:
    """A sound model, but not the one that was measured."""
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def sparse_file(folder: Path) -> None:
    """A file of a terabyte, where the manifest says a few hundred bytes."""
    os.truncate(folder / MODEL, 1 << 40)


def pipe(folder: Path) -> None:
    (folder / MODEL).unlink()
    os.mkfifo(folder / MODEL)


def files(change: Callable[[Any], None]) -> Damage:
    return alter_manifest(lambda c: change(c["files"]))


FILES: dict[str, tuple[Damage, str]] = {
    "missing model": (lambda f: (f / MODEL).unlink(), "is missing"),
    "missing cells": (lambda f: (f / CELLS).unlink(), "is missing"),
    "missing calibration": (lambda f: (f / CALIBRATION).unlink(), "is missing"),
    "wrong hash": (files(lambda c: c[MODEL].update(sha256="0" * 64)), "checksum differs"),
    "wrong size": (files(lambda c: c[MODEL].update(bytes=7)), "checksum differs"),
    "negative size": (files(lambda c: c[MODEL].update(bytes=-1)), "cannot be read"),
    "terabyte": (sparse_file, "checksum differs"),
    "terabyte announced": (files(lambda c: c[MODEL].update(bytes=1 << 39)), "are the limit"),
    "pipe": (pipe, "is missing"),
    "many files": (
        files(lambda c: c.update({f"f{i}": {"sha256": "", "bytes": 0} for i in range(99)})),
        "more than 16 files",
    ),
    "long manifest": (on_disk(MANIFEST, lambda d: d + b" " * (1 << 20)), "larger than"),
    "terabyte manifest": (lambda f: os.truncate(f / MANIFEST, 1 << 40), "larger than"),
    "nested manifest": (on_disk(MANIFEST, lambda _: b'{"a":' * 100_000), "cannot be read"),
    "newer manifest": (alter_manifest(lambda c: c.update(format=99)), "format 99"),
    "no keys": (alter_manifest(lambda c: c.update(count=0)), "cannot be read"),
    "no dimension": (alter_manifest(lambda c: c.update(dim=0)), "cannot be read"),
    "huge dimension": (alter_manifest(lambda c: c.update(dim=10**30)), "cannot be read"),
    "other number of cells": (alter_manifest(lambda c: c.update(n_cells=5)), "not what a linear"),
    "huge cells": (replace(CELLS, header("(1099511627776, 4)")), "shape and length differ"),
    "overflowing cells": (replace(CELLS, header("(1 << 99, 0)")), "cannot be read"),
    "negative cells": (replace(CELLS, header("(-4, -4)")), "negative size"),
    "cells of text": (replace(CELLS, header("(1,)", "'<U9'")), "is not what is written"),
    "pickled cells": (replace(CELLS, pickled), "is not what is written"),
    "cells that unpack": (replace(CELLS, bomb), "compressed"),
    "NaN cells": (replace(CELLS, spoilt("centroids", np.nan)), "impossible values"),
    "negative cell size": (replace(CELLS, spoilt("sizes", -1)), "impossible values"),
    "more cells": (replace(CELLS, extra_array), "too many arrays|archive with"),
    "no archive": (replace(CALIBRATION, lambda _: b"PK"), "cannot be read"),
    "huge calibration": (replace(CALIBRATION, header("(1099511627776,)")), "cannot be read"),
    "NaN calibration": (replace(CALIBRATION, spoilt("guaranteed", np.nan)), "impossible values"),
    "other weights": (model(other_weights), "gives other results here"),
    "other golden outputs": (
        replace(GOLDEN_OUTPUTS, spoilt("outputs", 7.0)),
        "gives other results here",
    ),
    "NaN golden output": (
        replace(GOLDEN_OUTPUTS, spoilt("outputs", np.nan)),
        "do not fit its model",
    ),
    "NaN golden query": (
        replace(GOLDEN_OUTPUTS, spoilt("queries", np.nan)),
        "gives other results here",
    ),
    "golden queries of another width": (
        replace(
            GOLDEN_OUTPUTS,
            lambda _: _archive(queries=np.zeros((8, DIM + 1)), outputs=np.zeros((8, 6))),
        ),
        "cannot be run",
    ),
    "fewer golden outputs": (
        replace(
            GOLDEN_OUTPUTS, lambda _: _archive(queries=np.zeros((8, DIM)), outputs=np.zeros((7, 6)))
        ),
        "do not fit its model",
    ),
    "no golden queries": (replace(GOLDEN_OUTPUTS, lambda _: b""), "golden outputs cannot be read"),
    "empty sample of keys": (replace(KEY_SAMPLE, lambda _: b"[]"), "sample of keys is empty"),
    "sample of keys that is no JSON": (replace(KEY_SAMPLE, lambda _: b"[["), "cannot be read"),
    "missing sample of keys": (lambda f: (f / KEY_SAMPLE).unlink(), "is missing"),
    "missing golden queries": (lambda f: (f / GOLDEN_OUTPUTS).unlink(), "is missing"),
    "NaN threshold": (replace(CALIBRATION, spoilt("thresholds", np.nan)), "impossible values"),
}

MISMATCHES: dict[str, tuple[Damage, str]] = {
    "wrong dimension": (alter_manifest(lambda c: c.update(dim=DIM + 1)), "dimension '5', not '4'"),
    "wrong metric": (alter_manifest(lambda c: c.update(metric="l2")), "metric 'l2', not 'cosine'"),
    "other collection": (
        alter_manifest(lambda c: c["collection"].update(name="others")),
        "'memory/others/vector', not 'memory/docs/vector'",
    ),
    "other database": (
        alter_manifest(lambda c: c["collection"].update(database="others")),
        "'others/docs/vector', not 'memory/docs/vector'",
    ),
}

SIZE = len(make_files()[MODEL])
PLACES = np.random.default_rng(0).integers(0, SIZE, 20).tolist()


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


def cut(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place]


DAMAGED = {
    **{f"cut at {p}": (on_disk(MODEL, cut(p)), "checksum differs") for p in PLACES},
    **{f"flipped at {p}": (on_disk(MODEL, flip(p)), "checksum differs") for p in PLACES},
    # With a manifest that says so, the check of the model itself meets it.
    **{f"published cut at {p}": (replace(MODEL, cut(p)), "model is refused") for p in PLACES},
}

FAULTS = [
    *(pytest.param(*fault, "BundleCorrupt", id=name) for name, fault in MODELS.items()),
    *(pytest.param(*fault, "BundleCorrupt", id=name) for name, fault in FILES.items()),
    *(pytest.param(*fault, "BundleCorrupt", id=name) for name, fault in DAMAGED.items()),
    *(pytest.param(*fault, "BundleMismatch", id=name) for name, fault in MISMATCHES.items()),
]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("TMPDIR_OF_TEST", str(tmp_path))
    return Registry(tmp_path / "registry")


def publish(registry: Registry, folder: Path, version: str) -> Path:
    """Publish a sound bundle; return where it is."""
    registry.publish(write_bundle(folder / version, version=version))
    return Path(registry._home(collection_key(memory().info))) / version


@pytest.mark.parametrize(("damage", "message", "error"), FAULTS)
def test_at_start_the_native_search_answers(
    registry: Registry,
    tmp_path: Path,
    damage: Damage,
    message: str,
    error: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(publish(registry, tmp_path, "v1"))
    router = LearnedRouter(memory(), registry=registry, refresh=None)
    assert not router.learned
    assert_native(router, f"bundle: {error}")
    (line,) = logged(caplog)
    assert "No bundle serves 'docs'" in line
    assert any(part in line for part in message.split("|")), line
    assert written(capfd) == ""  # nor does the runtime write to the terminal


@pytest.mark.parametrize(("damage", "message", "error"), FAULTS)
def test_on_refresh_the_running_version_serves_on(
    registry: Registry,
    tmp_path: Path,
    damage: Damage,
    message: str,
    error: str,  # noqa: ARG001 - the message says as much
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(registry, tmp_path, "v1")
    router = LearnedRouter(laid_out(tmp_path / "v1"), registry=registry, refresh=None)
    before = [list(hits) for hits in router.search(QUERIES, k=5, n_probes=3)]
    damage(publish(registry, tmp_path, "v2"))
    for _ in range(2):
        assert not router.refresh()
    assert router.manifest is not None
    assert router.manifest.version == "v1"
    after = router.search(QUERIES, k=5, n_probes=3)
    assert [list(hits) for hits in after] == before
    assert all((h.trace.mode, h.trace.version) == ("route", "v1") for h in after)
    assert not router.fallbacks
    (line,) = logged(caplog)
    assert "The bundle that runs serves 'docs' on" in line
    assert any(part in line for part in message.split("|")), line


def test_a_sound_version_is_taken_afterwards(registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path, "v1")
    router = LearnedRouter(laid_out(tmp_path / "v1"), registry=registry, refresh=None)
    model(operator("Erf"))(publish(registry, tmp_path, "v2"))
    assert not router.refresh()
    publish(registry, tmp_path, "v3")
    assert router.refresh()
    assert router.manifest is not None
    assert router.manifest.version == "v3"


@pytest.mark.parametrize(
    "latest",
    [
        b'{"version": "../../../etc"}',
        b'{"version": "/etc/passwd"}',
        b'{"version": ""}',
        b'{"version": "nowhere"}',
        b'{"version": 7}',
        b"[" * 100_000,
        b" " * (2 << 20) + b"{}",
    ],
)
def test_a_pointer_to_anywhere_else(registry: Registry, tmp_path: Path, latest: bytes) -> None:
    home = publish(registry, tmp_path, "v1").parent
    router = LearnedRouter(laid_out(tmp_path / "v1"), registry=registry, refresh=None)
    (home / "latest.json").write_bytes(latest)
    assert not router.refresh()
    assert router.search(QUERIES[0], k=5, n_probes=3).trace.version == "v1"
    fresh = LearnedRouter(memory(), registry=registry, refresh=None)
    assert_native(fresh, "bundle: Bundle")
