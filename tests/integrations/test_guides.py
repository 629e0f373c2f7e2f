"""Every code block of the frameworks' guides, run in the order of its section.

A section is a session: its python blocks share their names, with those of ``GIVEN`` to start from.
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
PAGES = ("langchain", "llama-index", "haystack")
GIVEN: dict[str, Any] = {"DIM": DIM, "embedding": embed("files in a folder")}
WORLDS = {  # a section, and the test module that fills its database
    ("langchain", "Qdrant"): ("test_langchain_qdrant", "LangChainQdrant"),
    ("langchain", "Milvus"): ("test_langchain_milvus", "LangChainMilvus"),
    ("llama-index", "Qdrant"): ("test_llama_index_qdrant", "LlamaIndexQdrant"),
    ("llama-index", "Milvus"): ("test_llama_index_milvus", "LlamaIndexMilvus"),
    ("haystack", "Qdrant"): ("test_haystack_qdrant", "HaystackQdrant"),
    ("haystack", "Milvus"): ("test_haystack_milvus", "HaystackMilvus"),
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """The kind and text of each block, by section."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = {
        part.partition("\n")[0]: FENCED.findall(part) for part in re.split("^## ", text, flags=re.M)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
@pytest.mark.parametrize(("page", "section"), WORLDS)
def test_a_section_runs_and_is_routed(
    page: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind = WORLDS[page, section]
    module = importlib.import_module(f"tests.integrations.{name}")  # skips without its framework
    if not hasattr(module, kind):  # it has skipped before
        pytest.skip("run it by: make frameworks")
    world = getattr(module, kind)(tmp_path)
    monkeypatch.setenv("AMIPS_REGISTRY", str(world.registry))
    given = {**GIVEN, "embeddings": None, "embed_model": None}
    if page == "langchain":
        given["embeddings"] = module.Hashed()
    if page == "llama-index":
        given["embed_model"] = module.shared.Hashed()
    if section == "Qdrant":
        monkeypatch.setattr("qdrant_client.QdrantClient", lambda *_, **__: world.client)
        aclient = getattr(world, "aclient", None)
        monkeypatch.setattr("qdrant_client.AsyncQdrantClient", lambda *_, **__: aclient)
    elif page != "llama-index":
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
        for number, (language, text) in enumerate(sections(page)[section]):
            assert language == "python"
            here = text.replace("http://localhost:19530", str(tmp_path / "docs.db"))
            code = compile(
                here, f"{page}.md {section} {number}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
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
        assert not router.fallbacks


@pytest.mark.parametrize("page", PAGES)
def test_what_else_a_page_holds_are_extras_that_there_are(page: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for title, blocks in sections(page).items():
        if (page, title) not in WORLDS:
            ((language, text),) = blocks
            assert language == "bash"
            extras = re.findall(r"amips-plugins\[(.+)\]", text)
            assert extras == [f"{page}-qdrant", f"{page}-milvus"]
            assert all(f"\n{extra} = [" in project for extra in extras)
