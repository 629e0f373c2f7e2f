from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

import amips_plugins

ROOT = Path(__file__).parent.parent
MAPPED = {"adapters": "amips_plugins.adapters", "export": "amips_plugins.export"}
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def listed() -> list[str]:
    """``packages`` of pyproject.toml; Python 3.10 has no tomllib."""
    found = re.search(r"^packages = \[(.*?)\]", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


def test_every_package_is_listed() -> None:
    folders = set()
    for top, name in {"amips_plugins": "amips_plugins", **MAPPED}.items():
        for path in (ROOT / top).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / top).parts
            if not (top == "amips_plugins" and inside[:1] and inside[0] in MAPPED):  # the links
                folders.add(".".join([name, *inside]))
    assert listed() == sorted(folders)


def test_the_mapped_folders_are_linked_too() -> None:
    for folder, package in MAPPED.items():
        link = ROOT / "amips_plugins" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert f'"{package}" = "{folder}"' in PYPROJECT


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("amips_plugins", *MAPPED):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_types_are_shipped() -> None:
    assert (ROOT / "amips_plugins" / "py.typed").exists()
    assert 'amips_plugins = ["py.typed"]' in PYPROJECT


def test_extras_named_in_messages_exist() -> None:
    extras = set(metadata("amips-plugins").get_all("Provides-Extra") or [])
    asked = set()
    for top in ("amips_plugins", *MAPPED):
        for path in (ROOT / top).rglob("*.py"):
            asked |= set(re.findall(r'require\("[^"]+", "([^"]+)"\)', path.read_text()))
    assert asked
    assert asked <= extras


def test_the_package_runs_from_this_tree() -> None:
    assert Path(amips_plugins.__file__).parent == ROOT / "amips_plugins"
