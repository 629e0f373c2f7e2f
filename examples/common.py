"""What the examples share: text, a stand-in embedder, a stand-in generator, and the steps.

Every example fills a database that is embedded in its process, asks some questions, and says how
each was answered. What is of its framework stands in the example, everything else here.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from amips_plugins.demo.corpus import Pair, pairs
from amips_plugins.export.snapshot import finished
from amips_plugins.routing.observers import Observation

__all__ = ["DIM", "QUESTIONS", "App", "StubGenerator", "embed", "main"]

DIM = 256
QUESTIONS = (
    "How do I wait for a connection on a socket?",
    "Compare two sequences of lines",
    "Which class parses command line options?",
)
_SHORTEST = 4  # letters of a word that is counted: the others are in every text


def embed(text: str) -> list[float]:
    """Stand in for an embedding model: count the longer words of a text, and runs of three letters.

    It is here so that the examples need no model and give the same on every machine. It knows
    letters and no meaning: put your own embedder in its place.

    Returns
    -------
    list of float
        ``DIM`` numbers, of length 1 together.
    """
    counts = np.zeros(DIM, dtype=np.float32)
    for word in re.findall(r"[a-z]+", text.lower()):
        if len(word) < _SHORTEST:
            continue
        marked = f"<{word}>"
        for piece in (marked, marked, *(marked[at : at + 3] for at in range(len(marked) - 2))):
            digest = zlib.crc32(piece.encode())
            counts[digest % DIM] += 1 if digest & 0x10000 else -1
    counts[0] += not counts.any()  # a text without letters has a place too
    vector: list[float] = (counts / np.linalg.norm(counts)).tolist()
    return vector


class StubGenerator:
    """Stands in for a language model: it only quotes the first passage it is given.

    Call your own model here, with the question and the passages for its prompt.
    """

    def __call__(self, question: str, passages: Sequence[tuple[str, str]]) -> str:
        """Answer a question from passages, each a title and a text, best first."""
        if not passages:
            return f"Nothing was found for {question!r}."
        quoted = textwrap.shorten(passages[0][1], 150, placeholder=" ...")
        others = ", ".join(title for title, _ in passages[1:])
        return quoted + (f"\nSee also {others}." if others else "")


@dataclass
class App:
    """One example's texts, folder and router.

    Attributes
    ----------
    folder
        Where everything is kept.
    limit
        How many texts.
    seen
        The search that was answered last, as the router saw it.
    """

    folder: Path
    limit: int
    seen: list[Observation] = field(default_factory=list)

    @functools.cached_property
    def texts(self) -> list[Pair]:
        """Docstrings of Python's standard library, each without the first sentence: its query."""
        found = pairs(self.limit, 0, [Path(sysconfig.get_path("stdlib"))])
        return [replace(pair, key=f"{pair.title}: {pair.key}") for pair in found]

    @property
    def registry(self) -> str:
        """Where the bundle is published."""
        return str(self.folder / "registry")

    def watch(self, search: Observation) -> None:
        """Keep what the router says of a search: an observer."""
        self.seen[:] = [search]

    def show(self, question: str, answer: str) -> None:
        """Print an answer, and how its passages were found."""
        print(f"\nQ: {question}")
        print(textwrap.indent(answer, "   "))
        print(f"   routed: {self._how()}")
        self.seen.clear()

    def _how(self) -> str:
        if not self.seen:
            return "no, the store searched natively"
        (search,) = self.seen
        if search.fallbacks:
            return f"no, the native search answered ({', '.join(search.fallbacks)})"
        if not search.routed:
            return "no, the native search answered"
        if search.scanned is None or search.scanned >= 1:  # see Collection.break_even
            return f"yes, {search.probes} cells, which hold so much that all keys were scanned"
        return f"yes, {search.probes} cells, {search.scanned:.0%} of the keys scanned"


def main(
    name: str, database: str, fill: Callable[[App], None], ask: Callable[[App], Iterator[str]]
) -> None:
    """Fill the database, learn from its queries where that is possible, and ask.

    Parameters
    ----------
    name
        Of the example.
    database
        URI of the collection, with ``{folder}`` for the folder.
    fill
        Builds the store of the framework and writes the texts to it; closes it again.
    ask
        Builds the store, routed, and yields the answer to each of ``QUESTIONS`` in turn.
    """
    parser = argparse.ArgumentParser(description=f"A RAG application: {name}.")
    parser.add_argument("--folder", type=Path, default=Path("build/examples", name))
    parser.add_argument("--texts", type=int, default=2_000, help="how many (default: 2000)")
    parser.add_argument(
        "--amips",
        default=_here(),
        help="the program `amips` of an environment with the extra train (default: this one's)",
    )
    given = parser.parse_args()
    app = App(given.folder.resolve(), given.texts)
    filled = app.folder / "queries.npy"
    if not filled.exists():
        if app.folder.exists():
            parser.error(f"{app.folder} is no finished folder of this example; delete it.")
        app.folder.mkdir(parents=True)
        # In a process of its own: Milvus Lite gives a file back when its process ends.
        filling = multiprocessing.get_context("spawn").Process(target=fill, args=(app,))
        filling.start()
        filling.join()
        if filling.exitcode:
            parser.exit(1, "The database could not be filled; what is above says why.\n")
        # What a QueryLog would hold: here every docstring's first sentence is a question.
        np.save(filled, np.array([embed(pair.query) for pair in app.texts], dtype=np.float32))
        print(f"{len(app.texts)} texts are in {app.folder}.")
    _learn(app, database.format(folder=app.folder), given.amips)
    for question, answer in zip(QUESTIONS, ask(app), strict=True):
        app.show(question, answer)


def _here() -> str | None:
    """Return this environment's ``amips``, if it can train."""
    if importlib.util.find_spec("torch") is None:
        return None
    return shutil.which("amips", path=str(Path(sys.executable).parent))


def _learn(app: App, uri: str, amips: str | None) -> None:
    """Run the four commands that make a router, or say that they are to be run."""
    if any(Path(app.registry).rglob("manifest.json")):
        return
    folder = app.folder
    queries = f"{folder}/queries.npy"
    commands = [
        ["snapshot", uri, "-o", f"{folder}/snap"],
        ["train", f"{folder}/snap", "--queries", queries, "--recall", "0.9", "-o", f"{folder}/run"],
        ["publish", f"{folder}/run", "--registry", app.registry],
        ["layout", uri, "--yes", "--registry", app.registry, "--work", f"{folder}/layout"],
    ]
    if amips is None:
        print(
            "No bundle yet: the native search answers. Training needs the extra train, which is "
            "not in this environment;\nrun this again with --amips PROGRAM, the amips of one that "
            "has it, or run these and then this again:"
        )
    trained = (folder / "run/bundle/manifest.json").exists()
    done = {"snapshot": finished(folder / "snap"), "train": trained}  # by a run that was stopped
    for command in commands:
        if done.get(command[0]):
            continue
        print(f"$ {shlex.join([amips or 'amips', *command])}", flush=True)
        if amips and subprocess.run([amips, *command], check=False).returncode:  # noqa: S603
            print("It says why; the questions are asked all the same.", flush=True)
            return
