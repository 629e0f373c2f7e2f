"""Several URIs in one command: read together, learned together, searched as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.cli import main
from tests.support import given_data, several_data

edge = pytest.importorskip("qdrant_edge")


@pytest.fixture
def uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten shards, named by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    keys = given_data.keys()
    for part in range(given_data.PARTS):
        folder = tmp_path / "shards" / f"docs{part}"
        folder.mkdir(parents=True)
        size = edge.EdgeVectorParams(size=given_data.DIM, distance=edge.Distance.Cosine)
        shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=size))
        own = keys[several_data.rows_of(part)].tolist()
        points = [edge.Point(n, vector) for n, vector in enumerate(own)]
        shard.update(edge.UpdateOperation.upsert_points(points))
        shard.close()
    np.save("queries.npy", given_data.queries())
    np.save("test.npy", given_data.queries(60, seed=9))
    return [
        f"part-{part}=qdrant-edge://{tmp_path}/shards?collection=docs{part}"
        for part in range(given_data.PARTS)
    ]


@pytest.mark.nightly
@pytest.mark.slow
def test_the_main_job(uris: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *uris, "--name", "docs", "--queries", "queries.npy"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.index("one graph") < said.index("largest first") < said.index("linear")
    assert "One graph over all keys" in said
    main(["snapshot", *uris, "--name", "docs", "-o", "snap"])
    arguments = ["--queries", "queries.npy", "--recall", "0.9", "--epochs", "3"]
    main(["train", "snap", *arguments, "-o", "run"])
    main(["publish", "run"])
    capsys.readouterr()
    asked = ["--name", "docs", "--queries", "test.npy", "--json"]
    main(["evaluate", *uris, *asked])
    rows = {row["search"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["native"]["recall_at_k"] == 1.0
    assert rows["learned, recall 0.90"]["recall_at_k"] > 0.85
    assert rows["learned, recall 0.90"]["n_probes"] < 5
    with pytest.raises(SystemExit) as ended:
        main(["status", *uris[1:], *asked])
    assert ended.value.code == 0
    status = json.loads(capsys.readouterr().out)["status"]
    assert status["partitions"]["gone"] == ["part-0"]


def test_bad_input_is_one_sentence(uris: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            [uris[0], uris[1].replace("part-1=", "part-0=")],
            "Two of the collections are called 'part-0'",
        ),
        ([*uris[:2], "--partitions", "topic"], "which are its partitions; name no field"),
    ):
        with pytest.raises(SystemExit):
            main(["snapshot", *arguments, "-o", "snap"])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", *uris[:2], "--memory", "1"])
    assert "--memory is of one collection" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", uris[0], "--memory", "1", "--partitions", "topic"])
    assert "--memory is answered without --partitions" in capsys.readouterr().err
