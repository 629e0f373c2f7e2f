"""Settings of every test."""

from __future__ import annotations

import hypothesis
import pytest

from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.routing import router

# A slow machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no search be repeated by chance: a test that wants a watch passes one."""
    monkeypatch.setattr(router, "HealthMonitor", lambda: HealthMonitor(share=0.0, drift_share=0.0))
