"""One training loop for every net: EMA, warm-up and cosine, clipping, early stopping, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from amips_plugins.errors import TrainingError
from amips_plugins.export.nets import Net
from amips_plugins.files import replace_file
from amips_plugins.progress import Progress, no_progress

__all__ = ["Schedule", "Score", "fit"]

_FEWEST_STEPS = 200
_SMALLEST_BATCH = 32


@dataclass(frozen=True)
class Schedule:
    """How to optimise.

    Attributes
    ----------
    epochs
        Passes over the training queries, at most.
    batch_size
        Queries a step, at most: few queries make small batches, so that there are enough steps.
    learning_rate
        Its peak, for AdamW.
    weight_decay
        Decoupled weight decay.
    warm_up
        Share of the steps in which the rate rises linearly; a cosine to zero follows.
    clip
        Largest norm of the gradient.
    ema
        Decay of the running mean of the weights, which is what is evaluated and published.
    patience
        Epochs without a better score before stopping early.
    """

    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.05
    clip: float = 1.0
    ema: float = 0.968
    patience: int = 5


@dataclass(frozen=True)
class Score:
    """How good a net is on the validation split.

    Attributes
    ----------
    value
        Larger is better.
    note
        The same for people.
    """

    value: float
    note: str


def fit(
    net: Net,
    loss: Callable[[Net, Tensor], Tensor],
    n_examples: int,
    evaluate: Callable[[Net], Score],
    schedule: Schedule,
    seed: int,
    checkpoint: Path,
    title: str,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Train a net in place and leave it with the best averaged weights.

    The same seed gives the same weights, interrupted or not: a checkpoint is written after every
    epoch, and the same call goes on from it.

    Raises
    ------
    TrainingError
        The loss is no longer finite.
    """
    run = _Run(net, schedule, n_examples, seed)
    if checkpoint.exists():
        with suppress(SafetensorError):  # a damaged file is refused whole: train from the start
            run.restore(checkpoint)
    device = next(net.parameters()).device
    with progress(title, schedule.epochs, run.epoch, "epochs") as step:
        while run.epoch < schedule.epochs and run.stale < schedule.patience:
            order = torch.randperm(
                n_examples, generator=torch.Generator().manual_seed(seed * 100_003 + run.epoch)
            )
            mean = run.pass_over(order.to(device), loss)
            with run.averaged():
                score = evaluate(net)
            run.record(mean, score.value)
            replace_file(checkpoint, run.dump())
            step.advance(note=f"loss {mean:.3f}, {score.note}")
    run.use_best()
    return run.history


class _Run:
    """Everything that changes while a net trains."""

    def __init__(self, net: Net, schedule: Schedule, n_examples: int, seed: int) -> None:
        self.net = net
        self.seed = seed
        self.schedule = schedule
        per_step = n_examples * schedule.epochs // _FEWEST_STEPS
        self.batch_size = min(schedule.batch_size, max(_SMALLEST_BATCH, per_step))
        self.steps_per_epoch = math.ceil(n_examples / self.batch_size)
        self.optimizer = torch.optim.AdamW(
            net.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.average = [p.detach().clone() for p in net.parameters()]
        self.best = [p.detach().clone() for p in net.parameters()]
        self.best_score = -math.inf
        self.epoch = 0
        self.stale = 0
        self.history: list[dict[str, float]] = []

    def pass_over(self, order: Tensor, loss: Callable[[Net, Tensor], Tensor]) -> float:
        """Train one epoch; return its mean loss."""
        self.net.train()
        torch.manual_seed(self.seed * 1_000_003 + self.epoch)  # a resumed epoch draws the same
        total = 0.0
        for number, rows in enumerate(torch.split(order, self.batch_size)):
            rate = self._rate(self.epoch * self.steps_per_epoch + number)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            value = loss(self.net, rows)
            value.backward()  # type: ignore[no-untyped-call] # torch's own signature is untyped
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.schedule.clip)
            self.optimizer.step()
            self.net.constrain()
            self._average()
            total += float(value.detach()) * len(rows)
        mean = total / len(order)
        if not math.isfinite(mean):
            raise TrainingError(
                "The training loss is no longer finite; lower the learning rate, and look at the "
                "vectors: lengths of very different size do this."
            )
        return mean

    def _rate(self, step: int) -> float:
        total = self.steps_per_epoch * self.schedule.epochs
        warm = max(1, int(total * self.schedule.warm_up))
        if step < warm:
            return self.schedule.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, total - warm)
        return self.schedule.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))

    @torch.no_grad()
    def _average(self) -> None:
        for mean, weight in zip(self.average, self.net.parameters(), strict=True):
            mean.lerp_(weight, 1.0 - self.schedule.ema)

    def averaged(self) -> _Swapped:
        """Return a context in which the net has the averaged weights."""
        return _Swapped(self.net, self.average)

    def record(self, loss: float, score: float) -> None:
        """End an epoch."""
        self.epoch += 1
        self.history.append({"loss": loss, "score": score})
        if score > self.best_score:
            self.best_score, self.stale = score, 0
            self.best = [mean.clone() for mean in self.average]
        else:
            self.stale += 1

    @torch.no_grad()
    def use_best(self) -> None:
        """Give the net its best averaged weights."""
        for weight, best in zip(self.net.parameters(), self.best, strict=True):
            weight.copy_(best)
        self.net.eval()

    def dump(self) -> bytes:
        """Serialise as safetensors."""
        tensors: dict[str, Tensor] = {}
        groups = {"net": self.net.parameters(), "average": self.average, "best": self.best}
        for name, group in groups.items():
            for place, tensor in enumerate(group):
                tensors[f"{name}.{place}"] = tensor.detach().contiguous().cpu()
        for place, parameter in enumerate(self.net.parameters()):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{place}.{name}"] = value.detach().contiguous().cpu()
        tensors["history"] = torch.tensor(
            [[row["loss"], row["score"]] for row in self.history], dtype=torch.float64
        )
        tensors["counters"] = torch.tensor(
            [self.epoch, self.stale, self.best_score], dtype=torch.float64
        )
        data: bytes = save(tensors)
        return data

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from what ``dump`` wrote."""
        parameters = list(self.net.parameters())
        with safe_open(path, framework="pt", device=str(parameters[0].device)) as file:
            for place, parameter in enumerate(parameters):
                parameter.copy_(file.get_tensor(f"net.{place}"))
                self.average[place] = file.get_tensor(f"average.{place}")
                self.best[place] = file.get_tensor(f"best.{place}")
                self.optimizer.state[parameter] = {
                    name: file.get_tensor(f"optimizer.{place}.{name}")
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }
            self.history = [
                {"loss": loss, "score": score}
                for loss, score in file.get_tensor("history").tolist()
            ]
            epoch, stale, self.best_score = file.get_tensor("counters").tolist()
        self.epoch, self.stale = int(epoch), int(stale)


class _Swapped:
    """Gives a net other weights for the length of a context."""

    def __init__(self, net: Net, weights: list[Tensor]) -> None:
        self._net = net
        self._weights = weights

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, other in zip(self._net.parameters(), self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)

    def __enter__(self) -> None:
        self._net.eval()
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
