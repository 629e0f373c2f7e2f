"""What a filter that has nothing to do with the vectors would do to the recall."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FuncFormatter

from amips_plugins.report.data import ReportData
from amips_plugins.report.style import BLUE, INK, ORANGE, Chart, new_axes, percent

__all__ = ["filtered_recall"]

_LEAST = 2  # times k that has to be calibrated, or there is nothing to show


def filtered_recall(data: ReportData) -> Chart | None:
    """Recall and cost by selectivity: the best k that pass are among the best k / selectivity."""
    calibration, k = data.calibration, data.manifest.default_k
    target = data.manifest.default_recall
    if calibration is None or calibration.max_k < _LEAST * k:
        return None
    threshold = calibration.default_threshold(k, target)
    if threshold == -np.inf:
        return None
    level = int((calibration.thresholds <= threshold).argmax())
    depths = np.unique(np.geomspace(k, calibration.max_k, 12).round().astype(int))
    passing = k / depths
    found = calibration.recall[depths - 1, level]
    enough = np.maximum.accumulate(calibration.guaranteed[depths - 1], axis=1) >= target
    needed = calibration.scanned[np.where(enough.any(axis=1), enough.argmax(axis=1), -1)]
    scanned = np.maximum.accumulate(needed)  # each depth has a bound of its own, by chance lower
    figure, axes = new_axes(7.4, 3.6, columns=2)
    axes[0].plot(passing, found, color=BLUE, marker="o", markersize=4)
    axes[0].axhline(target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes[0].set_ylabel(f"recall@{k}, searched as planned")
    axes[1].plot(passing, scanned, color=ORANGE, marker="o", markersize=4)
    axes[1].set_ylim(0.0, 1.02)
    axes[1].set_ylabel(f"keys to search for {target:.2f}")
    for one in axes:
        one.set_xscale("log")
        one.set_xlim(1.05, float(passing[-1]) * 0.95)
        one.set_xticks([share for share in (1.0, 0.5, 0.2, 0.1) if share >= passing[-1]])
        one.set_xticks([], minor=True)
        one.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        one.set_xlabel("keys that pass")
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    return Chart(
        "filtered-recall",
        f"Under a filter that passes {passing[-1]:.0%} of the keys the plan finds {found[-1]:.2f}",
        f"The best {k} keys that pass a filter of selectivity s, whatever their vectors, are about "
        f"the best {k} / s of all: calibration queries say how many of those a search finds as it "
        f"is planned, and how many keys it takes to find {target:.2f}. A filter that has to do "
        "with the vectors may find less; live searches decide when a filter is routed.",
        "Two line charts by the share of the keys that pass: recall falls, keys to search rise.",
        figure,
        ("pass", f"recall@{k} as planned", "keys to search"),
        tuple(
            (f"{share:.0%}", f"{recall:.3f}", percent(float(keys)))
            for share, recall, keys in zip(passing, found, scanned, strict=True)
        ),
    )
