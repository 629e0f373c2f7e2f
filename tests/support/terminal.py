"""What a test has written to the terminal."""

from __future__ import annotations

import pytest

__all__ = ["written"]


def written(capfd: pytest.CaptureFixture[str]) -> str:
    """Both streams, but for what gRPC says of channels that other tests have left open."""
    out, err = capfd.readouterr()
    lines = err.splitlines(keepends=True)
    return out + "".join(line for line in lines if "chttp2_transport" not in line)
