from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from amips_plugins import errors
from amips_plugins.errors import (
    AmipsError,
    BundleCorrupt,
    BundleError,
    BundleMismatch,
    BundleNotFound,
    BundleUnsigned,
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    MissingExtra,
    SnapshotError,
    TrainingError,
    require,
)


def test_the_tree() -> None:
    parents: dict[type, tuple[type, ...]] = {
        InvalidInput: (AmipsError, ValueError),
        MissingExtra: (AmipsError, ImportError),
        CollectionError: (AmipsError,),
        CollectionNotFound: (CollectionError,),
        FieldNotFound: (CollectionError,),
        MetricNotSupported: (CollectionError,),
        DatabaseUnreachable: (CollectionError,),
        SnapshotError: (AmipsError,),
        TrainingError: (AmipsError,),
        BundleError: (AmipsError,),
        BundleNotFound: (BundleError,),
        BundleCorrupt: (BundleError,),
        BundleMismatch: (BundleError,),
        BundleUnsigned: (BundleError,),
    }
    for error, bases in parents.items():
        assert error.__bases__ == bases
    assert errors.__doc__ is not None
    for name, member in inspect.getmembers(errors, inspect.isclass):
        if issubclass(member, AmipsError):
            assert name in errors.__all__
            assert name in errors.__doc__


def test_a_module_that_is_there() -> None:
    assert require("json.decoder", "train") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["amips_no_such", "amips_no_such.part", "json.no_such"])
def test_a_missing_module_names_its_extra(module: str) -> None:
    package = module.partition(".")[0]
    with pytest.raises(MissingExtra) as caught:
        require(module, "milvus-lite")
    assert str(caught.value) == (
        f"This needs the package {package!r}, which is not installed; "
        f"run: pip install 'amips-plugins[milvus-lite]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("missing", ["absent_dependency", "amips_bro"])
def test_a_broken_dependency_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (tmp_path / "amips_broken.py").write_text(f"import {missing}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=missing) as caught:
        require("amips_broken", "train")
    assert not isinstance(caught.value, AmipsError)


def test_another_import_error_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "amips_half.py").write_text("from json import nothing_like_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="nothing_like_this") as caught:
        require("amips_half", "train")
    assert not isinstance(caught.value, AmipsError)
