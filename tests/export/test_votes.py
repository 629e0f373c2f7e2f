from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.export import losses
from amips_plugins.export.clustering import native_cells
from amips_plugins.export.cost_curves import curve, levels_by_rank, thresholds_for
from amips_plugins.export.votes import members_by_votes, with_members
from amips_plugins.vectors import IntArray, Metric
from tests.support.training_data import gaussian

N_CELLS = 6


def task(seed: int, n: int = 80, depth: int = 5) -> tuple[IntArray, IntArray]:
    rng = np.random.default_rng(seed)
    assignment = rng.integers(N_CELLS, size=n)
    hits = np.stack([rng.permutation(n)[:depth] for _ in range(40)])
    return assignment, hits


def test_a_key_gets_the_cell_that_most_of_its_queries_look_into() -> None:
    assignment = np.array([0, 1, 1, 1, 2, 2])
    # Key 0 is found together with keys of cell 1 twice, with keys of cell 2 once.
    hits = np.array([[0, 1, 2], [0, 2, 3], [0, 4, 5]])
    members = members_by_votes(assignment, hits, 3, 1 / 6)
    assert members.tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [2, 2], [2, 2]]


def test_votes_are_counted_as_written() -> None:
    assignment, hits = task(3)
    votes = np.zeros((len(assignment), N_CELLS))
    for row in hits:
        share = np.bincount(assignment[row], minlength=N_CELLS) / len(row)
        for key in row:
            votes[key] += share
    votes[np.arange(len(assignment)), assignment] = 0.0
    members = members_by_votes(assignment, hits, N_CELLS, 0.25, most=2)
    copied = np.flatnonzero(members[:, 1] != members[:, 0])
    assert len(copied) == 20
    given_votes = votes[copied, members[copied, 1]]
    assert np.allclose(given_votes, votes[copied].max(axis=1))
    others = np.delete(votes.max(axis=1), copied)
    assert given_votes.min() >= others.max() - 1e-9


@given(
    seed=st.integers(0, 50),
    share=st.floats(0.0, 3.0),
    most=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_members_are_distinct_cells_within_the_share(seed: int, share: float, most: int) -> None:
    assignment, hits = task(seed)
    members = members_by_votes(assignment, hits, N_CELLS, share, most)
    assert (members[:, 0] == assignment).all()
    assert members.shape[1] <= most
    copies = 0
    for row in members.tolist():
        others = [cell for cell in row[1:] if cell != row[0]]
        assert len(set(others)) == len(others)
        copies += len(others)
    assert copies <= share * len(assignment)


def test_sizes_count_copies() -> None:
    keys = gaussian(80, 4)
    cells, assignment = native_cells(keys, Metric.COSINE, N_CELLS, 0)
    _, hits = task(0)
    members = members_by_votes(assignment, hits, N_CELLS, 0.5)
    sizes = with_members(cells, members).sizes
    for cell in range(N_CELLS):
        assert sizes[cell] == (members == cell).any(axis=1).sum()
    assert sizes.sum() > len(keys)


def test_a_hit_is_found_in_the_first_of_its_cells_that_is_searched() -> None:
    priority = np.array([[3.0, 2.0, 1.0]], dtype=np.float32)
    members = np.array([[[2, 1], [1, 1]]])
    sizes = np.array([4, 3, 3])
    measured = curve(levels_by_rank(priority), 3, members, sizes, 0.0, n_keys=8)
    assert measured.found.tolist() == [[1, 1]]
    assert measured.scanned[0].tolist() == pytest.approx([0.5, 0.875, 1.25])
    assert thresholds_for(priority, members)[0] == 2.0


def test_the_routing_loss_asks_for_any_cell_of_a_key() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    shares = torch.softmax(logits, dim=1)[0]
    one = torch.tensor([[0, 1]])
    assert losses.routing(logits, one).item() == pytest.approx(
        float(-(shares[0].log() + shares[1].log()) / 2)
    )
    several = torch.tensor([[[0, 1], [1, 1]]])  # the second key has one cell
    assert losses.routing(logits, several).item() == pytest.approx(
        float(-((shares[0] + shares[1]).log() + shares[1].log()) / 2)
    )
