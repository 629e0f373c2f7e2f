"""Training recipes by name."""

from __future__ import annotations

from dataclasses import dataclass

from amips_plugins.export.training_loop import Schedule

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """How one kind of net is trained.

    Attributes
    ----------
    schedule
        How to optimise.
    routing
        Weight of the routing loss.
    scores
        Weight of the regression of support values (SupportNet) or of consistency (KeyNet).
    keys
        Weight of gradient matching (SupportNet) or of key regression (KeyNet).
    copies
        Noisy copies of every training query.
    noise
        Their standard deviation.
    width, depth
        Hidden layers of the nets; a KeyNet of width 0 is linear.
    dropout
        Share of a KeyNet's hidden units left out while training.
    """

    schedule: Schedule
    routing: float = 0.0
    scores: float = 0.0
    keys: float = 0.0
    copies: int = 0
    noise: float = 0.02
    width: int = 0
    depth: int = 1
    dropout: float = 0.0


_LINEAR = Preset(Schedule(epochs=8, learning_rate=2e-2), routing=1.0)

PRESETS: dict[str, dict[str, Preset]] = {
    # Chosen on validation queries of npm2pypi; docs/method.md has the evidence.
    "default": {
        "linear": _LINEAR,
        "supportnet": Preset(
            Schedule(epochs=12, learning_rate=2e-3), routing=1.0, scores=1.0, width=64
        ),
        "keynet": Preset(Schedule(learning_rate=5e-3), routing=1.0, width=256, dropout=0.2),
    },
    # The paper's objectives, noise and optimiser; it has no linear router.
    "paper": {
        "linear": _LINEAR,
        "supportnet": Preset(Schedule(), scores=0.01, keys=1.0, copies=1, width=128, depth=2),
        "keynet": Preset(Schedule(), scores=0.01, keys=1.0, copies=1, width=512, depth=2),
    },
}
"""Recipes by name, and in each by kind of net."""
