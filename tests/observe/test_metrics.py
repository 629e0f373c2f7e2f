"""Metrics of routers, and a dashboard that asks for no other."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.collection import Id, Incomplete
from amips_plugins.health.drift import Drift
from amips_plugins.health.gate import Health, State
from amips_plugins.health.recall import Recall
from amips_plugins.observe.metrics import RouterMetrics
from tests.support.bundles import laid_out, memory, vectors, write_bundle
from tests.support.observed_router import watched_router
from tests.support.routing_data import QUERIES, TOO_FEW, only

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
LABELS = {"database": "memory", "collection": "docs", "field": "vector"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {**LABELS, **labels})


HEALTH = Health(
    state="widened",
    since="2026-01-01T00:00:00+00:00",
    reasons=("recall is below its target",),
    recall=Recall(n=100, mean=0.92, low=0.9, high=0.94, p5=0.7),
    drift=Drift(p_value=0.25, n=500),
)


def served(folder: Path, does: Health | None = HEALTH) -> CollectorRegistry:
    """The metrics of a router that has seen everything there is to see."""
    registry = CollectorRegistry()

    class Watched(LearnedRouter):
        @property
        def health(self) -> Health | None:
            return does

    router = Watched(laid_out(folder), bundle=folder, refresh=None)
    RouterMetrics(router, registry=registry)
    router.search(QUERIES, k=3, n_probes=2)
    router.search(QUERIES, k=5, n_probes=1, filter=only(*range(5)))
    whole = router.collection.search
    setattr(  # noqa: B010 - as one of several collections that does not answer
        router.collection,
        "search",
        lambda *asked: [Incomplete(hits, ("docs",)) for hits in whole(*asked)],
    )
    router.search(QUERIES, k=3, n_probes=2)
    setattr(router.collection, "search", whole)  # noqa: B010
    ids: list[Id] = [10_000]
    router.collection.upsert(ids, QUERIES[:1])
    router.refresh()
    return registry


def test_metrics_say_what_the_router_did(folder: Path) -> None:
    registry = CollectorRegistry()
    router, seen = watched_router(folder)
    RouterMetrics(router, registry=registry)
    assert value(registry, "amips_queries_total", mode="route") == 0.0
    assert value(registry, "amips_overflow_share") is None
    router.search(QUERIES, k=3, n_probes=2)
    router.search(QUERIES[0], k=3, n_probes=1)
    router.search(QUERIES, k=5, n_probes=1, filter=only(*range(5)))
    again = seen[2].modes["native"]
    count = 2 * len(QUERIES) + 1
    assert value(registry, "amips_queries_total", mode="route") == count - again
    assert value(registry, "amips_queries_total", mode="native") == again
    assert value(registry, "amips_fallbacks_total", reason=TOO_FEW) == router.fallbacks[TOO_FEW]
    assert value(registry, "amips_probes_count") == count
    assert value(registry, "amips_probes_sum") == 3 * len(QUERIES) + 1
    assert value(registry, "amips_scanned_share_count") == count
    scanned = sum(told.scanned or 0.0 for told in seen)
    assert value(registry, "amips_scanned_share_sum") == pytest.approx(scanned)
    for name, times in (
        ("amips_plan_seconds", [told.plan_seconds for told in seen]),
        ("amips_search_seconds", [told.search_seconds for told in seen]),
    ):
        assert value(registry, f"{name}_count") == len(seen)
        assert value(registry, f"{name}_sum") == pytest.approx(sum(times))
        within = value(registry, f"{name}_bucket", le="0.005")
        assert within == sum(time <= 0.005 for time in times)
        assert value(registry, f"{name}_bucket", le="+Inf") == len(seen)
    assert router.manifest is not None
    assert value(registry, "amips_learned") == 1.0
    version = router.manifest.version
    assert value(registry, "amips_bundle_info", version=version, model="linear") == 1.0
    router.refresh()
    assert value(registry, "amips_overflow_share") == 0.0


def test_one_collector_watches_every_router_of_the_process(folder: Path) -> None:
    registry = CollectorRegistry()
    other = MemoryCollection(vectors(), name="other")
    routers = [
        LearnedRouter(laid_out(folder), bundle=folder, refresh=None),
        LearnedRouter(laid_out(folder), bundle=folder, refresh=None),
        LearnedRouter(other, registry=folder / "nowhere", refresh=None),
    ]
    metrics = RouterMetrics(*routers[:2], registry=registry)
    metrics.watch(routers[2])
    for router in routers:
        router.search(QUERIES, n_probes=1, k=1)
    assert value(registry, "amips_queries_total", mode="route") == 2 * len(QUERIES)
    native = value(registry, "amips_queries_total", mode="native", collection="other")
    assert native == len(QUERIES)
    assert value(registry, "amips_learned", collection="other") == 0.0
    reason = "bundle: BundleNotFound"
    assert value(registry, "amips_fallbacks_total", reason=reason, collection="other") == 1.0
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        RouterMetrics(routers[0], registry=registry)


def test_both_formats_of_the_exposition_are_sound(folder: Path) -> None:
    registry = served(folder)
    text = exposition.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    parsed = parser.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    names = {family.name for family in parsed}
    assert {"amips_queries", "amips_search_seconds", "amips_bundle_info"} <= names
    lines = generate_latest(registry).decode().splitlines()
    assert len([line for line in lines if line.startswith("# TYPE")]) == 14
    documented = set(re.findall(r"``(amips_\w+)``", RouterMetrics.__doc__ or ""))
    assert documented == {line.split()[2] for line in lines if line.startswith("# TYPE")}


def test_a_scrape_asks_the_database_nothing(folder: Path) -> None:
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    registry = CollectorRegistry()
    RouterMetrics(router, registry=registry)
    for name in ("count", "overflow", "layout", "search", "current"):
        setattr(collection, name, None)  # calling it would raise
    assert generate_latest(registry)


@pytest.mark.parametrize(("state", "number"), [("healthy", 0), ("widened", 1), ("native", 2)])
def test_metrics_say_how_the_router_does(folder: Path, state: State, number: int) -> None:
    registry = served(folder, replace(HEALTH, state=state))
    assert value(registry, "amips_health") == number
    assert value(registry, "amips_shadow_recall") == 0.92
    assert value(registry, "amips_shadow_recall_low") == 0.9
    assert value(registry, "amips_drift_p") == 0.25
    unknown = served(folder, replace(HEALTH, state=state, recall=None, drift=None))
    assert value(unknown, "amips_health") == number
    assert value(unknown, "amips_shadow_recall") is None
    assert value(unknown, "amips_drift_p") is None
    assert value(served(folder, None), "amips_health") is None


def expressions(node: Any) -> list[str]:
    """Every PromQL expression of a dashboard."""
    if isinstance(node, list):
        return [text for part in node for text in expressions(part)]
    if not isinstance(node, dict):
        return []
    own = [node["expr"]] if isinstance(node.get("expr"), str) else []
    return own + [text for part in node.values() for text in expressions(part)]


WORDS = {"by", "without", "on", "ignoring", "group_left", "and", "or", "unless", "bool", "offset"}


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics that an expression asks for."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left)\s*\([^)]*\)", "", bare)
    names = set(re.findall(r"(?<![\w.$])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", bare))
    return names - WORDS


def labels_of(expression: str) -> set[str]:
    """Names of the labels that an expression asks for."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    matched = re.findall(r'([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*"', expression)
    return {name.strip() for names in grouped for name in names.split(",")} | set(matched)


def test_names_are_found_in_an_expression() -> None:
    text = 'sum by (mode) (rate(a_total{x="b(c)",y=~"$z"}[5m])) / ignoring(q) d:e > 0.5 or up'
    assert metrics_of(text) == {"a_total", "d:e", "up"}
    assert labels_of(text) == {"mode", "x", "y", "q"}


def test_every_metric_and_label_of_the_dashboard_is_there(folder: Path) -> None:
    registry = served(folder)
    samples: dict[str, list[dict[str, str]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "amips.json").read_text())
    asked = expressions(dashboard["panels"])
    assert len(asked) >= 9
    used: set[str] = set()
    for expression in asked:
        names = metrics_of(expression)
        assert names, expression
        used |= names
        for name in names:
            assert registry.get_sample_value(name, samples[name][0]) is not None
            scraped = {"job", "instance"}  # Prometheus adds these
            assert labels_of(expression) <= samples[name][0].keys() | {"le"} | scraped, expression
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            assert found is not None
            assert found[2] in samples[found[1]][0]
    families = {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in samples}
    assert families == {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in used}


def test_panels_are_distinct_and_ask_the_provisioned_source() -> None:
    yaml = pytest.importorskip("yaml")
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "amips.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    source = yaml.safe_load((MONITORING / "grafana" / "datasources.yaml").read_text())
    (uid,) = {entry["uid"] for entry in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in panels} == {uid}


def test_prometheus_asks_where_the_documentation_serves() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    port = target.rsplit(":", 1)[1]
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    assert f"start_http_server({port}" in page


def test_metrics_of_an_unused_router_are_sound() -> None:
    registry = CollectorRegistry()
    RouterMetrics(LearnedRouter(memory(), registry="nowhere"), registry=registry)
    RouterMetrics(registry=CollectorRegistry())
    assert value(registry, "amips_learned") == 0.0
