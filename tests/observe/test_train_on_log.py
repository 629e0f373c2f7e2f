"""From what a router served to the next training, through the command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.cli import main
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.observe.query_log import QueryLog


@pytest.mark.slow
def test_the_next_training_sees_what_was_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((400, 8), dtype=np.float32)
    queries = rng.standard_normal((600, 8), dtype=np.float32)
    collection = MemoryCollection(keys, name="docs")
    take_snapshot(collection, tmp_path / "snap")
    with QueryLog(tmp_path / "log") as log:
        router = LearnedRouter(collection, registry=tmp_path / "registry", observers=[log])
        for low in range(0, 600, 100):
            router.search(queries[low : low + 100])
    arguments = ["--model", "linear", "--cells", "4", "--epochs", "2", "--json"]
    main(
        [
            *("train", str(tmp_path / "snap"), "--queries-log", str(tmp_path / "log")),
            *(*arguments, "-o", str(tmp_path / "run")),
        ]
    )
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["queries"] == "log"
    asked = json.loads((tmp_path / "run" / "options.json").read_text())
    assert asked["queries"] == hashlib.sha256(queries.tobytes()).hexdigest()
