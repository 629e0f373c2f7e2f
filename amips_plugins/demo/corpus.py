"""Real text that is on every machine: the docstrings of the installed Python packages.

A docstring's first sentence asks for something, and the rest of it answers: the first sentence is
the query, the body is the key. Source files are read with ``ast`` and never imported.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import stat
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress

__all__ = ["Pair", "fold", "installed_roots", "pairs", "split_docstring"]

_MAX_FILE_BYTES = 1_000_000  # larger ones are generated tables
_MAX_KEY_CHARS = 1_000
_MIN_KEY_CHARS = 40
_MAX_QUERY_CHARS = 300
_MIN_QUERY_WORDS = 3
# An embedding model reads the beginning only: keys that begin alike would be one vector twice.
_SAME_BEGINNING = 200
# Vendored folders repeat packages that are installed as well, often with slightly other words.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "_vendor", "_vendored", "vendor", "_vendored_packages"}
)

# A full stop ends a sentence when a new one starts behind it, but not in "e.g. This" or "vs. That".
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)[.!?][\"'`)]*\s+(?=[^a-z\s])"
)
_RULE = re.compile(r"^[ \t]*([-=~^*#+])\1{2,}[ \t]*\n?", re.MULTILINE)  # line under or over a title
_CODE = re.compile(r"```|>>>|https?://|\*optional\*")  # nobody asks in these
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Pair:
    """One docstring, cut in two."""

    title: str  # dotted name of what it describes; not always unique
    query: str  # its first sentence
    key: str  # what follows


def fold(text: str) -> str:
    """Return the words of a text in one case: texts that fold alike say the same."""
    return " ".join(_WORD.findall(text.casefold()))


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Cut a docstring into its first sentence, on one line, and up to 1,000 characters more.

    None where one of them is too short to mean something, or the sentence is too long for a query
    or holds code.
    """
    # A lone surrogate or a control character is legal in source text, but not in a database.
    text = _CONTROL.sub("", docstring.encode("utf-8", "ignore").decode("utf-8"))
    text = inspect.cleandoc(_RULE.sub("", inspect.cleandoc(text))).strip()
    first, _, rest = text.partition("\n\n")
    end = _SENTENCE_END.search(first)
    if end is not None:
        first, rest = first[: end.end()], f"{first[end.end() :]}\n\n{rest}"
    query, key = " ".join(first.split()), inspect.cleandoc(rest).strip()
    if len(key) > _MAX_KEY_CHARS:
        key = key[:_MAX_KEY_CHARS].rpartition(" ")[0].rstrip() or key[:_MAX_KEY_CHARS]
    words = sum(any(map(str.isalpha, word)) for word in query.split())
    if words < _MIN_QUERY_WORDS or len(query) > _MAX_QUERY_CHARS or len(key) < _MIN_KEY_CHARS:
        return None
    return None if _CODE.search(query) else (query, key)


def installed_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    return [
        Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]


def _source_files(root: Path) -> list[Path]:
    """List the files an import could reach, in a fixed order; follows no link to a folder."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name.isidentifier() and name not in _SKIPPED_FOLDERS
        )
        found += [
            Path(folder, name)
            for name in sorted(files)
            if name.endswith(".py") and name[:-3].isidentifier() and not name.startswith("test_")
        ]
    return found


def _parse(path: Path) -> ast.Module | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
            return None
        source = path.read_bytes()  # bytes: the parser itself honours the file's coding line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's source
            return ast.parse(source)
    except (OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return None  # not readable as Python, or nested too deeply (MemoryError): one file less


def _documented(
    node: ast.AST, name: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield f"{name}.{child.name}", child
            yield from _documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt):  # definitions behind an if or a try
            yield from _documented(child, name)


def _docstrings(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    module = _parse(path)
    if module is None:
        return
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    for title, node in [(name, module), *_documented(module, name)]:
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            yield title, docstring


def pairs(
    limit: int,
    seed: int,
    roots: Sequence[Path] | None = None,
    progress: Progress = no_progress,
) -> list[Pair]:
    """Read pairs of query and key from the docstrings of packages, in the order of their titles.

    No query stands twice and no key begins like another, letter case, space and punctuation
    aside, so a random split by query holds no query on both sides. Where more exist than the
    limit, files are read in an order drawn from the seed until there are enough.
    """
    if limit < 1:
        raise InvalidInput(f"The number of pairs must be at least 1, but got {limit}.")
    files = _shuffled_files(installed_roots() if roots is None else roots, seed)
    queries: set[str] = set()
    keys: set[str] = set()
    found: list[Pair] = []
    with progress("read docstrings", len(files), 0, "files") as step:
        for done, (path, root) in enumerate(files):
            for title, docstring in _docstrings(path, root):
                split = split_docstring(docstring)
                if split is None:
                    continue
                query, key = fold(split[0]), fold(split[1])[:_SAME_BEGINNING]
                if query not in queries and key not in keys:
                    queries.add(query)
                    keys.add(key)
                    found.append(Pair(title, *split))
            enough = len(found) >= limit
            step.advance(len(files) - done if enough else 1, f"{len(found)} pairs")
            if enough:
                break
    return sorted(found[:limit], key=lambda pair: (pair.title, pair.query))


def _shuffled_files(roots: Sequence[Path], seed: int) -> list[tuple[Path, Path]]:
    """List files with their root, each real folder once, in an order drawn from the seed."""
    folders: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise InvalidInput(f"There is no folder {str(root)!r}; name one that holds packages.")
        folders.setdefault(root.resolve(), root)
    files = [(path, root) for root in folders.values() for path in _source_files(root)]
    random.Random(seed).shuffle(files)  # noqa: S311 - a sample, not a secret
    return files
