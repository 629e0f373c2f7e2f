"""The public names of the modules that only import where their framework is."""

from __future__ import annotations

import importlib

import pytest

from amips_plugins.errors import MissingExtra
from tests.support.public_names import check_public_names


@pytest.mark.parametrize("framework", ["langchain", "llama_index", "haystack"])
def test_public_names_are_sorted_and_there(framework: str) -> None:
    try:
        module = importlib.import_module(f"amips_plugins.integrations.{framework}")
    except MissingExtra:
        pytest.skip("run it by: make frameworks")
    assert "RoutedRetriever" in module.__all__
    check_public_names(module)
