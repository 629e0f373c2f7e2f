"""Settings of every test."""

from __future__ import annotations

import hypothesis

# A slow machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
