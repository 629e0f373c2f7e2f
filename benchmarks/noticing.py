"""How soon the never-worse gate notices, how rarely it errs, and what it costs a search.

    python benchmarks/noticing.py

Recall@10 of simulated queries of different difficulty: a beta distribution's (standard deviation
.12 of the recall at a mean of .95), and ten draws with it.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.health.change_detector import Detector
from amips_plugins.health.gate import FALSE_FALL, FALSE_RISE, SLACK
from amips_plugins.health.monitor import HealthMonitor, Watch
from amips_plugins.health.shadow_search import ServedQuery
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import Target

_TARGET = 0.95
_SPREAD = 3.0
_DIM = 384


def recalls(mean: float, rng: np.random.Generator) -> Iterable[float]:
    """Recall@10 of one query after the other."""
    while True:
        easy = rng.beta(mean * _SPREAD, (1.0 - mean) * _SPREAD, 1000)
        yield from (rng.binomial(10, easy) / 10).tolist()


def samples_until(gains: Iterable[float], most_loss: float, alpha: float, most: int) -> int:
    """Count the samples until the alarm, up to a limit."""
    detector = Detector(alpha)
    pairs = enumerate(islice(gains, most), 1)
    return next((at for at, gain in pairs if detector.add(gain, most_loss)), most)


def row(name: str, times: list[int]) -> str:
    """Lay out one line of a table."""
    p50, p95 = np.quantile(times, [0.5, 0.95])
    return f"| {name} | {p50:,.0f} | {p95:,.0f} | {np.mean(times):,.0f} |"


@click.command()
@click.option("--streams", default=100, show_default=True, help="Simulated streams of each kind.")
@click.option("--most", default=60_000, show_default=True, help="Samples of a stream at the most.")
def main(streams: int, most: int) -> None:
    """Simulate falls and returns, and time the hot path."""
    click.echo(f"Samples until a state down, target {_TARGET} ({streams} streams)\n")
    for mean in (0.95, 0.94, 0.93, 0.90, 0.80, 0.50):
        rng = np.random.default_rng(0)
        times = [
            samples_until(
                (_TARGET - r for r in recalls(mean, rng)), 1.0 - _TARGET, FALSE_FALL, most
            )
            for _ in range(streams)
        ]
        click.echo(row(f"recall {mean:.2f}", times))
    click.echo("\nSamples until a state up\n")
    enough = _TARGET - SLACK
    for mean in (0.94, 0.95, 0.96, 0.98, 1.00):
        rng = np.random.default_rng(0)
        times = [
            samples_until(
                (r - enough for r in recalls(min(mean, 1 - 1e-9), rng)), enough, FALSE_RISE, most
            )
            for _ in range(streams)
        ]
        click.echo(row(f"recall {mean:.2f}", times))
    _time_hot_path()


def _time_hot_path() -> None:
    collection, hook = MemoryCollection(np.eye(_DIM, dtype=np.float32)), NativeHook()
    watch = HealthMonitor(share=1e-9, drift_share=0.0)
    watched = Watch(collection, hook)
    watch.begin(watched)
    query = np.ones(_DIM, dtype=np.float32)

    def sample() -> None:
        served = ServedQuery(collection, hook, query, Target(10), [], "route", 1.0)
        watch.sample(watched, served)

    empty = min(timeit.repeat(lambda: None, number=100_000, repeat=10)) / 0.1
    coin = min(timeit.repeat(lambda: watch.chosen(), number=100_000, repeat=10)) / 0.1
    taken = min(timeit.repeat(sample, number=10_000, repeat=10)) / 0.01
    click.echo(f"\nMicroseconds: the coin {coin - empty:.2f}, a chosen query {taken - empty:.1f}")


if __name__ == "__main__":
    main()
