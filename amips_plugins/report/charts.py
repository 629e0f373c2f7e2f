"""The charts of a report. Each says in its title what it shows, and in a table the numbers."""

from __future__ import annotations

from amips_plugins.report.costs import latency, probes, promises, recall_against_cost
from amips_plugins.report.epochs import training
from amips_plugins.report.material import Material
from amips_plugins.report.searched import cell_sizes, flat_map
from amips_plugins.report.style import Chart

__all__ = ["all_charts"]


def all_charts(material: Material) -> list[Chart]:
    """Draw what the material is enough for, in the order of the page."""
    first = (recall_against_cost(material), promises(material))
    charts = [chart for chart in first if chart is not None]
    curves, live = material.curves, material.live
    if curves is not None and curves.probes:
        charts.append(probes(material, curves))
    if live is not None and live.native_ms:
        charts.append(latency(live))
    if material.cells is not None:
        charts.append(cell_sizes(material))
    if curves is not None:
        charts.append(flat_map(curves.flat))
        if curves.epochs:
            charts.append(training(curves))
    return charts
