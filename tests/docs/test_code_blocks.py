"""Every code block of README.md and docs/*.md is run, in the order of its page.

A page is one session. Its python blocks share their names, with those of ``given`` to start from;
``$`` lines of console blocks and the lines of bash and unnamed blocks are commands. ``amips`` runs
in this process, what follows is done by the shell. The pages name servers and folders as a reader
would; here they are Milvus Lite, Qdrant's local mode and a Qdrant Edge folder (``STANDS_FOR``).

What cannot run here is looked at as far as it can be (``_looked_at``: an extra, a target, a script
and a compose file are there) or stands in ``SKIPPED`` with its reason.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.cli import main

edge = pytest.importorskip("qdrant_edge")

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"frameworks.md"}  # tests/integrations/test_guides.py
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in ELSEWHERE),
]
_FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_RUN = ("python", "console", "bash", "")

STANDS_FOR = {  # what a page names, and what it is here
    "milvus:///path/to/docs.db": "milvus://{home}/docs.db",
    "milvus://localhost:19530": "milvus://{home}/docs.db",
    "http://localhost:19530": "{home}/docs.db",
    'MilvusClient("docs.db")': 'MilvusClient("{home}/docs.db")',  # one name for one file
    "qdrant://localhost:6333": "qdrant://{home}/qdrant",
    "/srv/shards": "{home}/shards",
    "/srv/docs.cells": "{home}/docs.cells",
    "s3://bucket/registry": "{home}/registry",
    "start_http_server(9464": "start_http_server(0",
    'QdrantClient("http://localhost:6333")': 'QdrantClient(path="{home}/qdrant")',
    # Seconds in place of minutes: pymilvus keeps an idle connection, and loses it while a long
    # training is in the same process.
    "amips train ": "amips train --model linear --epochs 3 ",
    "--cells 1024": "--cells 16",
    "amips tune ": "amips tune --budget-minutes 0 ",  # nor are indexes built
    "amips publish run-all/": "amips publish run-all/ --anyway",  # of the same keys twice
}

SKIPPED = {  # what a command contains, and why it is not run
    "timeout -s KILL": "it would kill these tests; adapters/milvus/test_layout_crashes.py does",
    "openssl genpkey": "it asks for a password; tests/bundle/test_signing.py makes keys",
    "openssl pkey": "it asks for a password; tests/bundle/test_signing.py makes keys",
    "--sign-key": "the key is made by the line above; bundle/test_signing.py publishes with one",
    "AMIPS_SIGNING_PASSWORD=": "belongs to the lines above",
    "AMIPS_REQUIRE_SIGNATURE=": "belongs to the lines above",
}
"""No more than these; a new one needs a reason."""


@dataclass
class Block:
    page: str
    line: int
    kind: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    page, found = path.read_text(), []
    for match in _FENCED.finditer(page):
        kind, text = match.group(2), inspect.cleandoc(match.group(3)) + "\n"
        line = page.count("\n", 0, match.start()) + 1
        found.append(Block(path.name, line, kind, text))
    return found


WITH_CODE = [path for path in PAGES if any(block.kind in _RUN for block in blocks(path))]
LONG = {
    "cell-files.md",
    "doctor.md",
    "observability.md",
    "operations.md",
    "partitions.md",
    "tune.md",
}


def commands(block: Block) -> list[tuple[str, bool]]:
    """The commands of a block, and whether it shows that they fail.

    They are what stands behind a ``$``, or every line where none does.
    """
    joined = block.text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip()]
    if any(line.startswith("$ ") for line in lines):
        following = [*lines[1:], ""]
        return [
            (line[2:], after.startswith("Error: "))
            for line, after in zip(lines, following, strict=True)
            if line.startswith("$ ")
        ]
    if block.kind == "" and not re.match(
        r"(amips|python|make|docker|pip|openssl|export) ", lines[0]
    ):
        return []  # what something printed
    return [(line, False) for line in lines]


@dataclass
class Session:
    """A page's folder, its variables, and what has been run."""

    home: Path
    capsys: pytest.CaptureFixture[str]
    names: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    ran: int = 0

    def here(self, text: str) -> str:
        for shown, real in STANDS_FOR.items():
            text = text.replace(shown, real.format(home=self.home))
        return text

    def python(self, block: Block) -> None:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(self.here(block.text), block.where, "exec", flags=flags)
        result = eval(code, self.names)  # noqa: S307 - the pages are ours
        if inspect.iscoroutine(result):
            asyncio.run(result)
        self.ran += 1
        for name in re.findall(r"^(\w+)\.close\(\)", block.text, re.MULTILINE):
            del self.names[name]  # closed already
        self.close()

    def close(self) -> None:
        """Close what a block has opened, as the end of its process would."""
        opened = {id(one): one for value in self.names.values() for one in [_opened(value)] if one}
        for one in opened.values():
            one.close()
        self.names = {name: one for name, one in self.names.items() if _opened(one) is None}

    def command(self, line: str, fails: bool, where: str) -> None:
        if any(part in line for part in SKIPPED) or _looked_at(line):
            return
        self.ran += 1
        line = self.here(line)
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            self.variables[name] = shlex.split(self.expanded(value))[0]
            return
        match = re.fullmatch(
            r"amips (.*?)(?: 2> (\S+))?(?: \| .*)?(?: > (\S+))?", line.split("   #")[0]
        )
        if match is None:
            self.shell(line)
            return
        arguments = shlex.split(self.expanded(match.group(1)))
        code = 0
        try:
            main(arguments)
        except SystemExit as exc:
            code = int(exc.code or 0)
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err, where
        good = (
            (1,) if fails else (0, 3, 4) if arguments[0] in ("doctor", "status", "tune") else (0,)
        )
        if code not in good:
            pytest.fail(f"{where}: {line}\n{err}")
        if match.group(3):
            Path(self.expanded(match.group(3))).write_text(out)

    def expanded(self, text: str) -> str:
        known = {**os.environ, **self.variables, "PWD": str(self.home), "HOME": str(self.home)}
        text = re.sub(r"\$(\w+)", lambda m: known[m.group(1)], text)
        return text.replace("~/", f"{self.home}/")

    def shell(self, line: str) -> None:
        subprocess.run(  # noqa: S603 - a line of our pages
            ["/bin/bash", "-c", line],
            cwd=self.home,
            check=True,
            env={**os.environ, "HOME": str(self.home)},
        )


def _looked_at(line: str) -> bool:
    """Whether a command is of a kind that is looked at and not run; it is then looked at."""
    words = line.split()
    if words[:2] == ["pip", "install"]:
        extras_of = (
            (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
        )
        known = set(re.findall(r"^([\w-]+) = \[", extras_of[2].partition("\n[")[0], re.MULTILINE))
        for extras in re.findall(r"amips-plugins\[([\w,-]+)\]", line):
            assert set(extras.split(",")) <= known, line
        return True
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return True
    if words[:2] == ["docker", "compose"]:
        assert (ROOT / words[words.index("-f") + 1]).is_file(), line
        return True
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
        return True
    return False


def _opened(value: Any) -> Any:
    """What has to be closed of a value that a block has made: a collection or a client."""
    found = getattr(value, "collection", value)
    named = type(found).__name__.endswith(("Collection", "Collections", "Client"))
    is_open = named and hasattr(found, "close")
    return found if is_open else None


def made_up() -> tuple[Any, Any]:
    """Keys of 60 topics, and questions that come from another place, as in start.md."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((60, 32))
    keys = topics[rng.integers(60, size=2500)] + 0.7 * rng.standard_normal((2500, 32))
    turned = topics @ (np.eye(32) + 0.35 * rng.standard_normal((32, 32)))
    asked = turned[rng.zipf(1.3, size=1400) % 60] + 0.7 * rng.standard_normal((1400, 32))
    return keys.astype(np.float32), asked.astype(np.float32)


def fill_milvus(home: Path, keys: Any) -> None:
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(home / "docs.db"))
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
    schema.add_field("title", DataType.VARCHAR, max_length=512)
    schema.add_field("year", DataType.INT64, default_value=2024)
    schema.add_field("topic", DataType.VARCHAR, max_length=16, default_value="")
    index = client.prepare_index_params()
    index.add_index("vector", index_type="IVF_FLAT", metric_type="COSINE", params={"nlist": 64})
    client.create_collection("docs", schema=schema, index_params=index)
    topics = (keys[:, :4] > 0) @ np.array([1, 2, 4, 8])
    rows = [
        {"id": n, "vector": v, "title": f"text {n}", "year": 2024, "topic": f"t{topics[n]}"}
        for n, v in enumerate(keys)
    ]
    client.insert("docs", rows)
    client.flush("docs")
    client.close()


def fill_qdrant(home: Path, keys: Any) -> None:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(home / "qdrant"))
    size = models.VectorParams(size=keys.shape[1], distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    points = [
        models.PointStruct(id=n, vector=v, payload={"title": f"text {n}", "year": 2000 + n})
        for n, v in enumerate(keys[:100].tolist())
    ]
    client.upsert("docs", points)
    client.close()


def fill_edge(home: Path, keys: Any) -> None:
    folder = home / "shards" / "docs"
    folder.mkdir(parents=True)
    vectors = edge.EdgeVectorParams(size=keys.shape[1], distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors))
    points = [edge.Point(n, v) for n, v in enumerate(keys.tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()


def log_queries(session: Session) -> None:
    """What a service has left behind: a query log; and a snapshot beside it."""
    from amips_plugins import LearnedRouter, connect
    from amips_plugins.observe.query_log import QueryLog

    collection = connect(session.variables["DOCS"])
    with QueryLog("queries/docs") as log:
        LearnedRouter(collection, observers=[log]).search(np.load("queries.npy")[:500])
    collection.close()
    main(["snapshot", session.variables["DOCS"], "-o", "snap"])
    session.capsys.readouterr()


@pytest.fixture
def session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Session]:
    """An empty folder with three databases, and the vectors that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for name in ("AMIPS_REGISTRY", "AMIPS_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "bin" / "amips"
    program.parent.mkdir()
    call = "from amips_plugins.cli import main; main()"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{call}' \"$@\"\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    keys, asked = made_up()
    np.save("queries.npy", asked[200:])
    np.save("queries-later.npy", asked[100:])
    np.save("test.npy", asked[:30])
    np.save("new.npy", keys[-900:])
    given = {"q": asked[0], "vectors": keys[:2], "__name__": "page"}
    # A reader at a terminal, who says yes.
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda *_: "y")
    made = Session(tmp_path, capsys, given)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.nightly if path.name in LONG else ())
        for path in WITH_CODE
    ],
    ids=lambda path: path.name,
)
def test_a_page(path: Path, session: Session) -> None:
    found = [block for block in blocks(path) if block.kind in _RUN]
    session.variables["DOCS"] = session.here("milvus://localhost:19530?collection=docs")
    text = "".join(block.text for block in found)
    keys, _ = made_up()
    if path.name != "start.md":  # which makes its own
        fill_milvus(session.home, keys)
    if "--queries-log" in text:
        log_queries(session)
    if "qdrant://" in text or "QdrantClient" in text:
        fill_qdrant(session.home, keys)
    if "qdrant-edge" in text:
        fill_edge(session.home, keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for block in found:
            if block.kind == "python":
                session.python(block)
            else:
                for line, fails in commands(block):
                    session.command(line, fails, block.where)


def test_there_is_little_that_is_not_run() -> None:
    lines = [
        line
        for path in PAGES
        for block in blocks(path)
        if block.kind in _RUN[1:]
        for line, _ in commands(block)
    ]
    skipped = [line for line in lines if any(part in line for part in SKIPPED)]
    assert len(lines) > 60
    assert len(skipped) <= 6
    for part in SKIPPED:  # none is left over
        assert any(part in path.read_text() for path in PAGES), part
