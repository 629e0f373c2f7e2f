from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from amips_plugins.errors import TrainingError
from amips_plugins.export.nets import KeyNet, LinearRouter, LowRankRouter, Net, SupportNet
from amips_plugins.export.training_loop import Schedule, Score, fit
from tests.support.progress_recorder import Recorder

DIM, CELLS, N = 5, 4, 70
SCHEDULE = Schedule(epochs=7, batch_size=16, learning_rate=0.02, weight_decay=0.01, patience=100)
KINDS: dict[str, Callable[[], Net]] = {
    "low-rank": lambda: LowRankRouter(DIM, CELLS, 2),
    "linear": lambda: LinearRouter(DIM, CELLS),
    "supportnet": lambda: SupportNet(DIM, CELLS, 6, 2),
    "keynet": lambda: KeyNet(DIM, 6, 1),
}


def new_net(kind: str) -> Net:
    torch.manual_seed(0)
    return KINDS[kind]()


torch.manual_seed(1)
INPUTS = torch.nn.functional.normalize(torch.randn(N, DIM))
TARGETS = torch.randn(N, DIM)


def loss(net: Net, rows: Tensor) -> Tensor:
    given = net(INPUTS[rows])
    scale = net.scale if isinstance(net, SupportNet) else 1.0
    error: Tensor = scale * given - TARGETS[rows, : given.shape[1]]
    return error.square().mean()


def evaluate(net: Net) -> Score:
    with torch.no_grad():
        value = -float(loss(net, torch.arange(N)))
    return Score(value, f"score {value:.3f}")


def weights(net: Net) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def run(
    net: Net,
    checkpoint: Path,
    schedule: Schedule = SCHEDULE,
    recorder: Recorder | None = None,
    seed: int = 0,
    loss: Callable[[Net, Tensor], Tensor] = loss,
    evaluate: Callable[[Net], Score] = evaluate,
) -> list[dict[str, float]]:
    return fit(net, loss, N, evaluate, schedule, seed, checkpoint, "fit", recorder or Recorder())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("epochs", [1, 3, 6, 7])
def test_an_interrupted_training_ends_bit_for_bit_the_same(
    kind: str, epochs: int, tmp_path: Path
) -> None:
    straight = new_net(kind)
    history = run(straight, tmp_path / "straight.safetensors")
    checkpoint = tmp_path / "resumed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(new_net(kind), checkpoint, recorder=Recorder(stop_after=epochs))
    resumed, recorder = new_net(kind), Recorder()
    assert run(resumed, checkpoint, recorder=recorder) == history
    assert recorder.started_at == [epochs]
    assert same(weights(resumed), weights(straight))


@pytest.mark.parametrize("call", [0, 3, 7, 13])
def test_an_interruption_in_the_middle_of_an_epoch_loses_only_that_epoch(
    call: int, tmp_path: Path
) -> None:
    straight = new_net("supportnet")
    history = run(straight, tmp_path / "straight.safetensors")
    calls = iter(range(1000))

    def interrupted(net: Net, rows: Tensor) -> Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss(net, rows)

    checkpoint = tmp_path / "resumed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(new_net("supportnet"), checkpoint, loss=interrupted)
    resumed, recorder = new_net("supportnet"), Recorder()
    assert run(resumed, checkpoint, recorder=recorder) == history
    assert recorder.started_at == [call // 5]  # 70 examples are 5 batches
    assert same(weights(resumed), weights(straight))


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    one, other = new_net("linear"), new_net("linear")
    history = run(one, tmp_path / "c.safetensors")

    def refuse(_net: Net, _rows: Tensor) -> Tensor:
        raise AssertionError

    assert run(other, tmp_path / "c.safetensors", loss=refuse) == history
    assert same(weights(one), weights(other))


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    nets = [new_net("keynet") for _ in range(3)]
    for place, (net, seed) in enumerate(zip(nets, (0, 0, 1), strict=True)):
        run(net, tmp_path / f"{place}.safetensors", seed=seed)
    assert same(weights(nets[0]), weights(nets[1]))
    assert not same(weights(nets[0]), weights(nets[2]))


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(net: Net, rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return loss(net, rows)

    run(new_net("linear"), tmp_path / "c.safetensors", loss=watch)
    epochs = [tuple(seen[low : low + N]) for low in range(0, len(seen), N)]
    assert len(set(epochs)) == SCHEDULE.epochs
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)


@pytest.mark.parametrize(
    ("n_examples", "epochs", "batch_size", "steps"),
    [
        (110_000, 1, 512, 215),  # enough queries: the batches asked for
        (2_000, 8, 512, 25),  # fewer: batches of 80, so that there are 200 steps
        (500, 8, 512, 16),  # few: never below 32
        (20, 8, 512, 1),
        (2_000, 8, 64, 32),  # never above what was asked for
        (70, 7, 16, 5),
    ],
)
def test_few_examples_make_small_batches(
    n_examples: int, epochs: int, batch_size: int, steps: int, tmp_path: Path
) -> None:
    sizes: list[int] = []

    def count(net: Net, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return loss(net, rows % N)

    schedule = Schedule(epochs=epochs, batch_size=batch_size, patience=100)
    checkpoint = tmp_path / "c.safetensors"
    fit(new_net("linear"), count, n_examples, evaluate, schedule, 0, checkpoint, "fit")
    assert len(sizes) == steps * epochs
    assert sum(sizes) == n_examples * epochs
    assert max(sizes) <= batch_size


def test_training_helps_and_history_tells_it(tmp_path: Path) -> None:
    net = new_net("keynet")
    before = evaluate(net).value
    history = run(net, tmp_path / "c.safetensors")
    assert len(history) == SCHEDULE.epochs
    assert history[-1]["loss"] < history[0]["loss"]
    assert evaluate(net).value == max(row["score"] for row in history) > before


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_keeps_the_best_averaged_weights(patience: int, tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    def up_then_down(net: Net) -> Score:
        seen.append(weights(net))
        return Score(-abs(len(seen) - 2.0), "")  # the second epoch is the best

    net = new_net("linear")
    schedule = dataclasses.replace(SCHEDULE, epochs=50, patience=patience)
    history = run(net, tmp_path / "c.safetensors", schedule, evaluate=up_then_down)
    assert len(history) == len(seen) == 2 + patience
    assert same(weights(net), seen[1])
    assert not same(weights(net), seen[-1])


def test_a_stopped_training_stays_stopped(tmp_path: Path) -> None:
    schedule = dataclasses.replace(SCHEDULE, epochs=50, patience=2)
    checkpoint = tmp_path / "c.safetensors"
    first = run(new_net("linear"), checkpoint, schedule, evaluate=lambda _: Score(0.0, ""))
    assert len(first) == 3
    again = run(new_net("linear"), checkpoint, schedule, evaluate=lambda _: Score(9.0, ""))
    assert again == first


def test_the_mean_of_the_weights_is_evaluated_and_the_net_trains_on(tmp_path: Path) -> None:
    evaluated: list[list[Tensor]] = []

    def watch(net: Net) -> Score:
        evaluated.append(weights(net))
        return evaluate(net)

    schedule = dataclasses.replace(SCHEDULE, epochs=1, ema=1.0)
    net = new_net("keynet")
    run(net, tmp_path / "c.safetensors", schedule, evaluate=watch)
    assert same(evaluated[0], weights(new_net("keynet"))), "a mean that never moves"
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        trained = [file.get_tensor(f"net.{place}") for place in range(len(evaluated[0]))]
    assert not same(trained, evaluated[0])


def test_a_supportnet_keeps_its_constraint(tmp_path: Path) -> None:
    net = new_net("supportnet")
    run(net, tmp_path / "c.safetensors", dataclasses.replace(SCHEDULE, learning_rate=0.5))
    assert isinstance(net, SupportNet)
    assert all(bool((p >= 0).all()) for p in (*net.mix, *net.norm))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value: float, tmp_path: Path) -> None:
    calls = iter(range(1000))

    def breaks(net: Net, rows: Tensor) -> Tensor:
        return loss(net, rows) * (value if next(calls) >= 7 else 1.0)

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(TrainingError, match="no longer finite; lower the learning rate"):
        run(new_net("linear"), checkpoint, loss=breaks)
    # The checkpoint is the one of the last sound epoch: the training can go on from it.
    recorder = Recorder()
    run(new_net("linear"), checkpoint, recorder=recorder)
    assert recorder.started_at == [1]


def test_checkpoints_are_safetensors_and_nothing_else_is_left(tmp_path: Path) -> None:
    checkpoint = tmp_path / "deep" / "c.safetensors"
    run(new_net("supportnet"), checkpoint)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    with safe_open(checkpoint, framework="pt") as file:
        names = set(file.keys())
        assert {"history", "counters", "net.0", "average.0", "best.0"} <= names
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in names)


def test_progress_carries_loss_and_score(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Recorder):
        def advance(self, amount: int = 1, note: str = "") -> None:
            super().advance(amount, note)
            notes.append(note)

    recorder = Notes()
    run(new_net("linear"), tmp_path / "c.safetensors", recorder=recorder)
    assert recorder.totals == [recorder.done] == [SCHEDULE.epochs]
    assert all("loss" in note and "score" in note for note in notes)
