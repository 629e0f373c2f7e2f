"""How the models trained."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from amips_plugins.report.style import (
    COLOURS,
    DASHES,
    INK,
    MARKS,
    NAMES,
    Chart,
    legend_below,
    listed,
    model_sign,
    new_axes,
    percent,
)
from amips_plugins.report.training_record import Curves

__all__ = ["training"]


def training(curves: Curves) -> Chart:
    """Loss and cost by epoch."""
    figure, (left, right) = new_axes(7.4, 3.5, columns=2)
    rows = []
    best = {}
    for epochs in curves.epochs:
        name, colour = epochs.candidate, COLOURS[epochs.candidate][0]
        x = np.arange(1, len(epochs.loss) + 1)
        for axes, values in ((left, epochs.loss), (right, epochs.cost)):
            axes.plot(
                x, values, color=colour, dashes=DASHES[name], marker=MARKS[name], markersize=5
            )
        best[name] = min(epochs.cost)
        pairs = zip(epochs.loss, epochs.cost, strict=True)
        rows += [
            (NAMES[name], f"{at}", f"{loss:.4g}", percent(cost))
            for at, (loss, cost) in enumerate(pairs, start=1)
        ]
        at = int(np.argmin(epochs.cost))
        right.plot([at + 1], [epochs.cost[at]], "o", ms=12, fillstyle="none", color=colour, mew=1.2)
    legend_below(figure, [model_sign(name, NAMES[name]) for name in best])
    left.set_title("training loss", loc="left", fontsize=10.5, color=INK)
    right.set_title("cost on validation queries", loc="left", fontsize=10.5, color=INK)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    winner = min(best, key=lambda name: best[name])
    return Chart(
        "training",
        f"The {NAMES[winner]} came down to {percent(best[winner])} of a full scan on validation "
        f"queries",
        "Losses of different nets are not comparable; costs are: the mean over recalls around the "
        "target, model included. The ringed epoch is the one that was kept.",
        f"Two line charts by epoch, of the training loss and of the cost, for "
        f"{listed([NAMES[name] for name in best])}.",
        figure,
        ("model", "epoch", "loss", "cost"),
        tuple(rows),
    )
