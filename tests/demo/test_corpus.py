from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from amips_plugins.demo.corpus import Pair, fold, installed_roots, pairs, split_docstring
from amips_plugins.errors import InvalidInput
from tests.support.progress_recorder import Recorder

BODY = "It keeps the order of the {} and never changes what came in, whatever happens."


def function(name: str, sentence: str, body: str) -> str:
    return f'def {name}():\n    """{sentence}\n\n    {body}\n    """\n'


def write(root: Path, path: str, source: str | bytes) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return file


def titles(root: Path) -> list[str]:
    return [pair.title for pair in pairs(1000, 0, [root])]


def many(root: Path, files: int = 30) -> None:
    for number in range(files):
        write(
            root,
            f"pkg/module{number}.py",
            function("one", f"Sort the list number {number}.", BODY.format(f"one{number}"))
            + function("two", f"Count the words number {number}.", BODY.format(f"two{number}")),
        )


def test_modules_classes_and_functions_get_dotted_titles(tmp_path: Path) -> None:
    text = (
        'class Coder:\n    """Turn values into text.\n\n    {0}\n    """\n    def encode(self):\n'
    )
    method = '        """Encode one single value.\n\n        {1}\n        """\n'
    hidden = "try:\n    import fast\nexcept ImportError:\n    pass\nif True:\n    "
    late = function("late", "Define this one later.", BODY.format("late")).replace("\n", "\n    ")
    module = f'"""Read and write values.\n\n{BODY.format("module")}\n"""\n'
    source = module + (text + method).format(BODY.format("class"), BODY.format("method"))
    write(tmp_path, "json/__init__.py", source + hidden + late)
    assert titles(tmp_path) == ["json", "json.Coder", "json.Coder.encode", "json.late"]


def test_a_pair_is_the_first_sentence_and_the_dedented_rest(tmp_path: Path) -> None:
    source = (
        'async def f():\n    """Sort a list,\n    e.g. Names. It is stable.\n\n'
        "    Parameters\n    ----------\n"
        "    key\n        Compares two of the items with each other.\n"
        '    """\n'
    )
    write(tmp_path, "a.py", source)
    rest = "It is stable.\n\nParameters\nkey\n    Compares two of the items with each other."
    assert pairs(5, 0, [tmp_path]) == [Pair("a.f", "Sort a list, e.g. Names.", rest)]


@pytest.mark.parametrize(
    ("docstring", "why"),
    [
        ("Return the value.\n\nToo short a body.", "short body"),
        (f"Return self.\n\n{BODY}", "fewer than three words"),
        (f"x = 1 + 2 == 3\n\n{BODY}", "no words"),
        (f"{'Very ' * 80}long.\n\n{BODY}", "long sentence"),
        (f">>> from x import y, z\n\n{BODY}", "code"),
        (f"size (`int`, *optional*): The size of it.\n\n{BODY}", "a parameter"),
        (f"See https://example.org for all of it.\n\n{BODY}", "link"),
        ("Return the value of this.", "no body"),
        ("", "empty"),
    ],
)
def test_what_makes_no_pair(docstring: str, why: str) -> None:
    assert split_docstring(docstring) is None, why


def test_titles_lose_their_lines_and_keys_are_cut_between_words() -> None:
    split = split_docstring("=====\nTools for JSON\n=====\n\n" + "value " * 400)
    assert split is not None
    assert split[0] == "Tools for JSON"
    assert 990 < len(split[1]) <= 1000
    assert split[1].endswith("value")


def test_texts_can_be_stored_in_a_database() -> None:
    split = split_docstring(f"Split at \ud800 or \x00 zero.\n\n{BODY}\x1b\udfff")
    assert split == ("Split at or zero.", BODY)
    "".join(split).encode("utf-8")


def test_files_that_cannot_be_read_as_python_are_passed_over(tmp_path: Path) -> None:
    good = function("good", "Do the right thing.", BODY)
    write(tmp_path, "good.py", good)
    write(tmp_path, "broken.py", "def f(:\n")
    write(tmp_path, "nul.py", b"x = '\x00'\n")
    write(tmp_path, "deep.py", "(" * 5000 + ")" * 5000)
    write(tmp_path, "chain.py", "x = " + "-" * 50_000 + "1")
    write(tmp_path, "notutf8.py", b'"""Caf\xe9 with no coding line."""\n')
    write(tmp_path, "codec.py", b"# coding: no-such-codec\n" + good.encode())
    write(tmp_path, "huge.py", function("huge", "Be far too large.", BODY) + "#" * 1_000_001)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")  # reading it would wait for ever
    assert titles(tmp_path) == ["good.good"]


def test_a_coding_line_is_honoured(tmp_path: Path) -> None:
    source = "# coding: latin-1\n" + function("f", "Make a good café.", BODY)
    write(tmp_path, "a.py", source.encode("latin-1"))
    assert pairs(5, 0, [tmp_path])[0].query == "Make a good café."


def test_tests_vendored_copies_and_what_no_import_reaches_are_passed_over(tmp_path: Path) -> None:
    folders = ["pkg/tests", "test", "pip/_vendor/x", "site-packages/x", "x-1.0.dist-info", ".git"]
    for number, folder in enumerate(folders):
        write(tmp_path, f"{folder}/a.py", function("f", f"Do task number {number}.", BODY))
    write(tmp_path, "pkg/test_it.py", function("f", "Test that it works.", BODY))
    write(tmp_path, "pkg/run-me.py", function("f", "Run it as a script.", BODY))
    assert titles(tmp_path) == []


def test_links_in_a_circle_and_a_root_named_twice_are_read_once(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    write(root, "pkg/a.py", function("f", "Do the right thing.", BODY))
    (root / "pkg" / "again").symlink_to(root)
    (tmp_path / "lib64").symlink_to(root)
    recorder = Recorder()
    found = pairs(100, 0, [root, root, tmp_path / "lib64"], recorder)
    assert [pair.title for pair in found] == ["pkg.a.f"]
    assert recorder.totals == [1]


def test_no_query_and_no_key_stands_twice(tmp_path: Path) -> None:
    body = BODY.format("x") * 4
    source = function("first", "Sort the whole list.", body)
    source += function("same_query", "SORT the  whole list!", BODY.format("others"))
    source += function("same_key", "Order all the items.", body.upper())
    source += function("same_beginning", "Order the items again.", body + " And more of it.")
    source += function("other", "Do quite other things.", BODY.format("others"))
    write(tmp_path, "a.py", source)
    found = pairs(100, 0, [tmp_path])
    assert [pair.title for pair in found] == ["a.first", "a.other"]


def test_the_same_seed_draws_the_same_sample(tmp_path: Path) -> None:
    many(tmp_path)
    sample = pairs(11, 3, [tmp_path])
    assert len(sample) == 11
    assert sample == pairs(11, 3, [tmp_path])
    assert sample == sorted(sample, key=lambda pair: pair.title)
    assert sample != pairs(11, 4, [tmp_path])
    assert set(sample) <= set(pairs(1000, 3, [tmp_path]))
    assert pairs(1000, 3, [tmp_path]) == pairs(1000, 4, [tmp_path])


def test_progress_ends_at_its_total_although_reading_stops_early(tmp_path: Path) -> None:
    many(tmp_path)
    recorder = Recorder()
    pairs(5, 0, [tmp_path], recorder)
    assert recorder.totals == [30]
    assert recorder.done == 30


def test_source_is_never_run_and_warns_of_nothing(tmp_path: Path) -> None:
    source = function("f", "Match one digit only.", BODY) + "x = '\\d'\nx is 1\nraise SystemExit\n"
    write(tmp_path, "never_imported_by_the_demo.py", source)
    assert titles(tmp_path) == ["never_imported_by_the_demo.f"]
    assert "never_imported_by_the_demo" not in sys.modules


def test_bad_arguments_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        pairs(0, 0, [tmp_path])
    with pytest.raises(InvalidInput, match="no folder"):
        pairs(1, 0, [tmp_path / "nowhere"])


def test_the_installed_packages_hold_real_pairs() -> None:
    found = pairs(300, 0, [installed_roots()[0]])
    assert len(found) == 300
    assert len({fold(pair.query) for pair in found}) == 300
    assert len({fold(pair.key) for pair in found}) == 300
