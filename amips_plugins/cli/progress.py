"""Progress on a terminal as a bar with rate and time left, elsewhere as plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

from amips_plugins.progress import Step

__all__ = ["show_progress"]

_EVERY = 10.0  # seconds between plain lines


class _Bar:
    """A tqdm bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move the bar."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)


class _Lines:
    """A line now and then."""

    def __init__(self, title: str, total: int, done: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = done
        self._started = self._said = time.monotonic()
        self._note = ""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count, and say so when the last line is old."""
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._said >= _EVERY and self._done < self._total:
            self.say()

    def say(self) -> None:
        """Print one line."""
        self._said = time.monotonic()
        elapsed = self._said - self._started
        rate = (self._done - self._before) / elapsed if elapsed else 0.0
        left = (self._total - self._done) / rate if rate else 0.0
        text = f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {elapsed:.0f} s"
        if left:
            text += f", {rate:,.{0 if rate >= 10 else 1}f} {self._unit}/s, about {left:.0f} s left"
        click.echo(text + (f" ({self._note})" if self._note else ""), err=True)


def _has_room() -> bool:
    """Whether there is a terminal, and one that tells its size: without it tqdm draws nothing."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


@contextmanager
def show_progress(title: str, total: int, done: int = 0, unit: str = "") -> Iterator[Step]:
    """Show a step (the signature of ``amips_plugins.progress.Progress``)."""
    if _has_room():
        with tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=f" {unit}",
            unit_scale=total >= 10_000,
            dynamic_ncols=True,
            smoothing=0.1,
        ) as bar:
            yield _Bar(bar)
    else:
        lines = _Lines(title, total, done, unit)
        yield lines
        lines.say()
