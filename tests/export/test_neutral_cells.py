"""Another program, which has numpy and the description, gets the cells that a service gets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.contents import CALIBRATION, CELLS, load
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import InvalidInput
from amips_plugins.export.nets import LinearRouter, LowRankRouter, Router, SupportNet
from amips_plugins.export.neutral_cells import _linear_form, export_cells
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.models.hooks import cells_above
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, Metric, lift_queries, lifted_dim, normalise
from tests.support.trainings import DIM, keys, queries, short_run

N_CELLS = 6


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    return json.loads((folder / "cells.json").read_text()), load_file(folder / "cells.safetensors")


def own_cells(tensors: Any, metric: Metric, vectors: FloatArray) -> Any:
    """What cells.json says of keys, in numpy."""
    if metric is Metric.L2:
        place = vectors - tensors.get("centre", np.float32(0))
    else:
        place = normalise(vectors)
    seen = place
    if "view_matrix" in tensors:
        moved = place + tensors["view_weight"] * normalise(place @ tensors["view_matrix"])
        moved = moved if metric is Metric.L2 else normalise(moved)
        popularity = tensors["popularity"]
        seen = np.hstack([moved, (place @ popularity[:-1] + popularity[-1])[:, None]])
    return (seen @ tensors["centroids"].T + tensors["offsets"]).argmax(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_a_reader_follows_the_description_to_the_same_cells(tmp_path: Path, metric: Metric) -> None:
    snapshot = take_snapshot(MemoryCollection(keys(), metric=metric), tmp_path / "snap")
    options = TrainOptions(model="linear", n_cells=16, epochs=2, spill=0.2)
    run = train(snapshot, queries(), tmp_path / "run", options)
    bundle = Bundle.in_folder(run.bundle)
    described = export_cells(bundle, tmp_path / "out")
    written, tensors = read(tmp_path / "out")
    assert written == json.loads(json.dumps(described))
    assert set(written["tensors"]) == set(tensors)
    for name, file in written["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]

    new = keys(3_000)[-500:]
    assert (own_cells(tensors, metric, new) == load(bundle)[CELLS].assign(new, metric)).all()
    assert len(tensors["assignment"]) == len(keys())
    assert tensors["further_cells"].shape[1] == 2

    asked = queries(200, seed=9)
    lifted = lift_queries(asked, metric, tensors.get("centre"))
    scores = normalise(lifted) @ tensors["router_weight"].T + tensors["router_bias"]
    priority = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)) + tensors["router_offset"]
    (served,) = OnnxModel((tmp_path / "out" / "model.onnx").read_bytes()).run(
        ["priority"], {"queries": asked}
    )
    level = int(np.searchsorted(tensors["guaranteed"][9], 0.9))
    assert tensors["thresholds"][level] == load(bundle)[CALIBRATION].threshold(10, 0.9)
    same = [
        set(a.tolist()) == set(b.tolist())
        for a, b in zip(
            cells_above(priority, tensors["thresholds"][level]),
            cells_above(served, tensors["thresholds"][level]),
            strict=True,
        )
    ]
    assert np.mean(same) > 0.9  # 8 bits of a query move a cell at the edge now and then


def net_of(kind: type[Router], metric: Metric) -> Router:
    torch.manual_seed(0)
    dim = lifted_dim(DIM, metric)
    net: Router
    if kind is LinearRouter:
        net = LinearRouter(dim, N_CELLS)
    elif kind is LowRankRouter:
        net = LowRankRouter(dim, N_CELLS, 3)
    else:
        net = SupportNet(dim, N_CELLS, width=8)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.5 * torch.randn_like(weight))
        net.constrain()
    return net


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("int8", [False, True])
def test_a_linear_router_is_read_back(metric: Metric, int8: bool) -> None:
    net = net_of(LinearRouter, metric)
    assert isinstance(net, LinearRouter)
    order = Order(3.0, np.arange(N_CELLS, dtype=np.float32))
    centre = np.ones(DIM, dtype=np.float32) if metric is Metric.L2 else None
    model = to_onnx(net, DIM, metric, order, int8=int8, centre=centre)
    found = _linear_form(model, metric, DIM, centre)
    assert found is not None
    np.testing.assert_allclose(found[0], 3 * net.weight.detach(), atol=0.05 if int8 else 1e-6)
    np.testing.assert_allclose(found[1], 3 * net.bias.detach(), rtol=1e-6)
    np.testing.assert_array_equal(found[2], order.offset)


@pytest.mark.parametrize("kind", [LowRankRouter, SupportNet])
def test_what_is_not_linear_is_left_to_the_model(kind: type[Router]) -> None:
    order = Order(1.0, np.zeros(N_CELLS, dtype=np.float32))
    model = to_onnx(net_of(kind, Metric.COSINE), DIM, Metric.COSINE, order)
    assert _linear_form(model, Metric.COSINE, DIM, None) is None


def test_a_linear_form_that_disagrees_with_the_model_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = Order(3.0, np.zeros(N_CELLS, dtype=np.float32))
    model = to_onnx(net_of(LinearRouter, Metric.COSINE), DIM, Metric.COSINE, order, int8=True)
    monkeypatch.setattr("amips_plugins.export.neutral_cells._STEPS", 127)
    assert _linear_form(model, Metric.COSINE, DIM, None) is None


@pytest.mark.slow
def test_a_keynet_has_no_cells(tmp_path: Path) -> None:
    snapshot = take_snapshot(MemoryCollection(keys(400)), tmp_path / "snap")
    run = train(snapshot, queries(400), tmp_path / "run", TrainOptions(model="keynet", epochs=1))
    with pytest.raises(InvalidInput, match="'keynet' has no cells to export"):
        export_cells(Bundle.in_folder(run.bundle), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_writes_and_does_not_overwrite_what_is_not_its_own(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from amips_plugins.cli import command

    run = short_run(tmp_path)
    out = tmp_path / "out"
    call = ["export-cells", str(run.bundle.parent), "-o", str(out)]
    first = CliRunner().invoke(command, call, catch_exceptions=False)
    assert "16 cells of" in first.output
    again = CliRunner().invoke(command, [*call, "--json"], catch_exceptions=False)
    assert json.loads(again.output)["n_cells"] == 16
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("")
    with pytest.raises(InvalidInput, match="holds something else"):
        CliRunner().invoke(
            command,
            [*call[:-1], str(tmp_path / "own")],
            catch_exceptions=False,
            standalone_mode=False,
        )
