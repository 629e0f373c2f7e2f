"""What importing and serving loads; each case in a fresh interpreter."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import amips_plugins
from amips_plugins.errors import MissingExtra
from tests.support.bundles import write_bundle
from tests.support.public_names import check_public_names

HEAVY = {
    "torch",
    "faiss",
    "pymilvus",
    "milvus_lite",
    "qdrant_client",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "fsspec",
    "safetensors",
    "sentence_transformers",
    "tqdm",
    "click",
    "opentelemetry",
    "prometheus_client",
    "pyarrow",
    "model_signing",
    "sigstore",
    "cryptography",
    "matplotlib",
}
TRAINING = {"torch", "faiss", "onnx", "onnxscript", "safetensors"}
WATCHING = {"opentelemetry", "prometheus_client", "pyarrow"}
SIGNING = {"model_signing", "sigstore", "cryptography"}
CLIENTS = {"pymilvus", "milvus_lite", "qdrant_client"}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def loaded(code: str, *arguments: str) -> set[str]:
    """Top-level modules loaded after running the code."""
    ending = "\nimport sys; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    done = run(code + ending, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import amips_plugins",
        "from amips_plugins import LearnedRouter, MemoryCollection",
        "from amips_plugins import AmipsError, Hits, Metric, PreQueryHook, QueryPlan, Registry",
        "from amips_plugins import Target, connect",
        "import amips_plugins.evaluation, amips_plugins.layout, amips_plugins.models.hooks",
        "import amips_plugins.export, amips_plugins.adapters, amips_plugins.demo",
        "import amips_plugins.observe.query_log, amips_plugins.routing.observers",
        "import amips_plugins.bundle.signing, amips_plugins.bundle.loading",
        "import amips_plugins.health.monitor, amips_plugins.health.status_file",
        "import amips_plugins.status",
        "import amips_plugins.doctor.diagnose",
        "import amips_plugins.report.data, amips_plugins.report.timings",
    ],
)
def test_importing_is_cheap(code: str) -> None:
    assert loaded(code) & HEAVY == set()


SERVE = """
import sys
import numpy as np
from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.layout import lay_out
from amips_plugins.collection import collection_key

folder, root, keys = sys.argv[1:]
collection = MemoryCollection(np.load(keys), name="docs")
Registry(root).publish(folder)
lay_out(collection, Registry(root).open(collection_key(collection.info)))
hits = LearnedRouter(collection, registry=root).search(np.ones(4), k=3, n_probes=2)
assert hits.trace.mode == "route", hits.trace
"""


def test_serving_loads_no_training_library_and_no_client(tmp_path: Path) -> None:
    import numpy as np

    from tests.support.bundles import vectors

    np.save(tmp_path / "keys.npy", vectors())
    folder = write_bundle(tmp_path / "bundle")
    modules = loaded(SERVE, str(folder), str(tmp_path / "registry"), str(tmp_path / "keys.npy"))
    assert modules & (TRAINING | CLIENTS | WATCHING | SIGNING) == set()
    assert "onnxruntime" in modules


def test_tuning_takes_nothing_that_training_needs() -> None:
    assert loaded("import amips_plugins.tune.apply, amips_plugins.cli.tune") & TRAINING == set()


@pytest.mark.parametrize(
    ("blocked", "code", "extra"),
    [
        ("pymilvus", "connect('milvus://127.0.0.1:1?collection=docs')", "milvus"),
        ("pymilvus", "connect('milvus:///docs.db?collection=docs')", "milvus-lite"),
        ("milvus_lite", "connect('milvus:///docs.db?collection=docs')", "milvus-lite"),
        ("qdrant_client", "connect('qdrant:///docs?collection=docs')", "qdrant"),
        ("qdrant_client", "from amips_plugins import QdrantCollection", "qdrant"),
        ("prometheus_client", "import amips_plugins.observe.metrics", "metrics"),
        ("opentelemetry", "import amips_plugins.observe.tracing", "tracing"),
        ("matplotlib", "import amips_plugins.report.page", "report"),
        (
            "model_signing",
            "from amips_plugins import Registry; Registry('x', require_signature='key.pub')",
            "signing",
        ),
        (
            "pyarrow",
            "import amips_plugins.observe.query_log as log; log.QueryLog('x')",
            "query-log",
        ),
    ],
)
@pytest.mark.slow
def test_a_missing_extra_is_named(blocked: str, code: str, extra: str) -> None:
    done = run(
        f"import sys; sys.modules[{blocked!r}] = None\nfrom amips_plugins import connect\n{code}"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("amips_plugins.errors.MissingExtra: This needs the package")
    assert blocked in last
    assert last.endswith(f"pip install 'amips-plugins[{extra}]'")


@pytest.mark.parametrize("blocked", ["torch", "faiss", "safetensors", "onnx"])
@pytest.mark.slow
def test_training_names_the_extra_it_needs(blocked: str) -> None:
    done = run(
        "import sys; sys.modules[sys.argv[1]] = None\nimport amips_plugins.export.train", blocked
    )
    last = done.stderr.splitlines()[-1]
    assert last.endswith("run: pip install 'amips-plugins[train]'")
    assert f"{blocked!r}" in last


def test_a_snapshot_needs_no_extra() -> None:
    blocks = f"import sys\nfor name in {sorted(TRAINING)}: sys.modules[name] = None\n"
    done = run(blocks + "import amips_plugins.export.snapshot")
    assert done.returncode == 0, done.stderr


def test_without_any_extra_the_core_works() -> None:
    absent = sorted(TRAINING | CLIENTS | WATCHING | SIGNING)
    blocks = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    done = run(
        blocks + "import numpy as np\n"
        "from amips_plugins import LearnedRouter, MemoryCollection\n"
        "from amips_plugins.models.hooks import NativeHook\n"
        "router = LearnedRouter(MemoryCollection(np.eye(3)), hook=NativeHook())\n"
        "print(router.search([0.0, 1.0, 0.0], k=1)[0].id)"
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_every_public_name_resolves() -> None:
    for name in amips_plugins.__all__:
        assert getattr(amips_plugins, name).__name__ == name
    assert dir(amips_plugins) == amips_plugins.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = amips_plugins.nothing


def modules() -> list[str]:
    packages = pkgutil.walk_packages(amips_plugins.__path__, "amips_plugins.")
    return ["amips_plugins", *(module.name for module in packages)]


@pytest.mark.parametrize("name", modules())
def test_public_names_are_sorted_and_there(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingExtra as exc:  # a framework's: tests/integrations/test_public_names.py
        pytest.skip(str(exc))
    check_public_names(module)
