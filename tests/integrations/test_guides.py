"""Every code block of the frameworks' page, run in the order of its tab.

A tab is a session: its python blocks share their names, with those of ``GIVEN`` to start from.
The servers that it names stand for an embedded database that is filled and laid out.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from amips_plugins.routing.router import LearnedRouter
from tests.integrations.corpus import DIM, embed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "frameworks.md"
GIVEN: dict[str, Any] = {"DIM": DIM, "embedding": embed("files in a folder")}
WORLDS = {  # a section and a tab, and the test module that fills its database
    ("Qdrant", "LangChain"): ("test_langchain_qdrant", "LangChainQdrant"),
    ("Milvus", "LangChain"): ("test_langchain_milvus", "LangChainMilvus"),
    ("Qdrant", "LlamaIndex"): ("test_llama_index_qdrant", "LlamaIndexQdrant"),
    ("Milvus", "LlamaIndex"): ("test_llama_index_milvus", "LlamaIndexMilvus"),
    ("Qdrant", "Haystack"): ("test_haystack_qdrant", "HaystackQdrant"),
    ("Milvus", "Haystack"): ("test_haystack_milvus", "HaystackMilvus"),
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TAB = re.compile(r"^::::\{tab-item\} (\w+)\n:sync: ([\w-]+)\n(.*?)^::::$", re.DOTALL | re.MULTILINE)


def tabs() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The kind and text of each block, by section and tab."""
    found = {}
    for part in re.split("^## ", PAGE.read_text(), flags=re.MULTILINE):
        for framework, _, text in TAB.findall(part):
            found[part.partition("\n")[0], framework] = FENCED.findall(text)
    return {place: blocks for place, blocks in found.items() if blocks}


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
@pytest.mark.parametrize(("section", "framework"), WORLDS)
def test_a_tab_runs_and_is_routed(
    section: str, framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind = WORLDS[section, framework]
    module = importlib.import_module(f"tests.integrations.{name}")  # skips without its framework
    if not hasattr(module, kind):  # it has skipped before
        pytest.skip("run it by: make frameworks")
    world = getattr(module, kind)(tmp_path)
    monkeypatch.setenv("AMIPS_REGISTRY", str(world.registry))
    given = {**GIVEN, "embeddings": None, "embed_model": None}
    if framework == "LangChain":
        given["embeddings"] = module.Hashed()
    if framework == "LlamaIndex":
        given["embed_model"] = module.shared.Hashed()
    if section == "Qdrant":
        monkeypatch.setattr("qdrant_client.QdrantClient", lambda *_, **__: world.client)
        aclient = getattr(world, "aclient", None)
        monkeypatch.setattr("qdrant_client.AsyncQdrantClient", lambda *_, **__: aclient)
    elif framework != "LlamaIndex":
        assert not world.client.has_collection("docs_live")
        world.client.create_alias(
            world.client.describe_collection("docs")["collection_name"], "docs_live"
        )
    routers: list[LearnedRouter] = []
    steps = LearnedRouter.search_effects

    def counted(self: LearnedRouter, *args: Any, **kwargs: Any) -> Any:
        routers.append(self)
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(LearnedRouter, "search_effects", counted)

    async def run() -> None:  # in one loop: clients belong to theirs
        for number, (language, text) in enumerate(tabs()[section, framework]):
            assert language == "python"
            here = text.replace("http://localhost:19530", str(tmp_path / "docs.db"))
            if section == "Qdrant":
                here = here.replace('"docs"', f'"{getattr(world, "name", "docs")}"')
            code = compile(
                here, f"{section} {framework} {number}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
            result = eval(code, given)  # noqa: S307 - the pages are ours
            if inspect.isawaitable(result):
                await result
            for results in ("found", "nodes", "documents", "varied"):
                assert given.get(results, True), f"block {number} has found nothing"

    asyncio.run(run())
    assert len(routers) >= 2
    for router in routers:
        assert router.manifest is not None
        # A page also shows filters, of a class that nobody has measured yet.
        assert set(router.fallbacks) <= {"filter: not measured"}


def test_what_else_the_page_holds_are_extras_that_there_are() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    names = dict(match[:2] for match in TAB.findall(PAGE.read_text()))
    others = {place: blocks for place, blocks in tabs().items() if place not in WORLDS}
    assert [framework for _, framework in others] == list(names)
    for (_, framework), ((language, text),) in others.items():
        assert language == "bash"
        extras = re.findall(r"amips-plugins\[(.+)\]", text)
        assert extras == [f"{names[framework]}-qdrant", f"{names[framework]}-milvus"]
        assert all(f"\n{extra} = [" in project for extra in extras)


def test_every_block_stands_in_a_tab() -> None:
    assert sum(map(len, tabs().values())) == len(FENCED.findall(PAGE.read_text()))
