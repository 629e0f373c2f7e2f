"""Every example, run as its page says: without a bundle, and with one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {  # and what has to be installed
    "rag_langchain_qdrant": "langchain_qdrant",
    "rag_langchain_milvus": "langchain_milvus",
    "rag_llama_index_qdrant": "llama_index.vector_stores.qdrant",
    "rag_llama_index_milvus": "llama_index.vector_stores.milvus",
    "rag_haystack_qdrant": "haystack_integrations.document_stores.qdrant",
    "rag_haystack_milvus": "milvus_haystack",
}
PUBLISH = """
import sys
from pathlib import Path
import numpy as np
from amips_plugins import connect
from tests.handmade import publish
folder = Path(sys.argv[2])
publish(connect(sys.argv[1]), np.load(folder / "queries.npy"), folder, n_cells=8, recall=0.9)
"""


def run(example: str, folder: Path, *more: str) -> str:
    script = str(ROOT / "examples" / f"{example}.py")
    asked = [sys.executable, script, "--folder", str(folder), "--texts", "300", *more]
    done = subprocess.run(asked, cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def answers(printed: str) -> list[str]:
    """Each question and the passage quoted."""
    return re.findall(r"^Q: .+\n   .+", printed, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_runs_without_a_bundle_and_with_one(example: str, tmp_path: Path) -> None:
    pytest.importorskip(EXAMPLES[example], reason="run it by: make frameworks")
    folder = tmp_path / "here"
    native = run(example, folder)
    assert native.count("routed: no, the native search answered (bundle: BundleNotFound)") == 3
    assert native.count("No bundle yet") == 1

    # The first of the commands that it prints names the collection.
    commands = [shlex.split(line[2:]) for line in native.splitlines() if line.startswith("$ ")]
    assert [words[:2] for words in commands] == [
        ["amips", step] for step in ("snapshot", "train", "publish", "layout")
    ]
    subprocess.run(  # noqa: S603 - a process of its own: one at a time has the file
        [sys.executable, "-c", PUBLISH, commands[0][2], str(folder)], cwd=ROOT, check=True
    )

    routed = run(example, folder)
    assert "No bundle" not in routed
    assert len(re.findall(r"routed: yes, \d+ cells, .*keys (?:were )?scanned$", routed, re.M)) == 3
    # At recall .9, and of texts that hardly answer, some of the first passages stay the same.
    assert len(answers(routed)) == len(answers(native)) == 3
    assert set(answers(routed)) & set(answers(native))


def test_a_folder_that_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("langchain_qdrant", reason="run it by: make frameworks")
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(AssertionError, match="no finished folder of this example; delete it"):
        run("rag_langchain_qdrant", tmp_path)
    assert (tmp_path / "mine").read_text() == "kept"


def test_the_page_says_how_to_run_each() -> None:
    there = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    page = (ROOT / "examples" / "README.md").read_text()
    (line,) = re.findall(r"```python\n(.+)\n```", page)
    assert there.keys() == {*EXAMPLES, "common"}
    for example in EXAMPLES:
        old = "2" if example == "rag_llama_index_milvus" else "3"
        command = f".venv-frameworks-{old}/bin/python examples/{example}.py --amips .venv/bin/amips"
        assert page.count(f"\n{command}\n") == 1
        assert there[example].count(f"    {line}  # the one line\n") == 1
