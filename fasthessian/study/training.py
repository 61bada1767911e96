"""The training of one run of a study, which can be killed and goes on with the same bits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.checkpoints import shards
from fasthessian.errors import InputError
from fasthessian.results.record import write_whole
from fasthessian.study import weights
from fasthessian.study.augment import crop_and_flip
from fasthessian.study.data import ImageData, subset
from fasthessian.study.networks import Run
from fasthessian.study.recipes import Recipe
from fasthessian.study.records import DIVERGED, TRAINED, UNTRAINED, Training
from fasthessian.study.sgd import OnStep, descend, evaluate

STATE, RECORD = "state.safetensors", "training.json"
CURVES = ("rates", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "weight_norm")
GUESSING = 1.5  # a training is one of 'not trained' below this many times the chance accuracy


def train_run(
    run: Run,
    recipe: Recipe,
    data: ImageData,
    folder: str | os.PathLike[str],
    progress: OnStep | None = None,
) -> Training:
    """Train one run of a study, or go on from where an earlier call was stopped.

    The seed draws the weights, and the order and augmentation of the images; torch's global
    generators do not change. After each epoch the whole state is written to ``state.safetensors``.
    A call that was killed at any moment can be repeated, and the weights are then the same to the
    bit, on the same machine with the same number of threads. The weights before training and after
    the epochs in ``recipe.checkpoints`` are written to ``epoch-000.safetensors`` and so on. The
    record is written to ``training.json`` when the training ends; from then on it is only read.

    A training ends early, as "diverged", when a loss is not finite. The state and the weights of
    that epoch are not written.

    Args:
        run: network, seed and initial learning rate.
        recipe: all other numbers.
        data: images; the training takes place on their device.
        folder: of this run alone; made if it is missing.
        progress: called with (steps done, steps in all).

    Raises:
        ImportError: safetensors is missing.
        OSError: a file cannot be written; what was written before is whole, and the next call goes
            on from there.
        ValueError: the folder holds a training with other numbers or data, or a damaged file.
    """
    folder = Path(folder)
    shards.required()
    recipe.check_images(len(data.train_y))
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(run, recipe, data)
    if (folder / STATE).is_file():
        job.restore(folder / STATE)
    if not (folder / RECORD).is_file():
        with repeatable():
            job.train(folder, progress)
        text = json.dumps(job.record().to_json(), allow_nan=False)
        write_whole(folder / RECORD, text.encode(), overwrite=True)
    return Training.from_json(json.loads((folder / RECORD).read_text()))


class _Job:
    """A training between two epochs."""

    def __init__(self, run: Run, recipe: Recipe, data: ImageData) -> None:
        self.run, self.recipe, self.data = run, recipe, data
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(run.seed)
            self.model: nn.Module = run.network.make(data.classes, recipe.width)
        # convolutions are faster in this format; files have torch's default one
        self.model.to(data.train_x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            run.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.generator = torch.Generator().manual_seed(run.seed)  # of order and augmentation
        self.history: list[tuple[float, ...]] = []  # CURVES of each finished epoch
        self.seconds = 0.0

    def train(self, folder: Path, progress: OnStep | None) -> None:
        """Make the epochs that are left, and write their files."""
        recipe, data = self.recipe, self.data
        start = time.perf_counter() - self.seconds
        x, y = data.train_x, data.train_y
        if (count := recipe.train_images) is not None:
            [(x, y)] = subset(x, y, count, count)
        per_epoch = math.ceil(len(y) / recipe.batch_size)

        def augment(images: Tensor) -> Tensor:
            return crop_and_flip(images, self.generator, flip=data.flips)

        def on_step(done: int) -> None:
            if progress is not None:
                steps = per_epoch * recipe.epochs
                progress(per_epoch * len(self.history) + done, steps)

        if not self.history and 0 in recipe.checkpoints:
            self.save_weights(folder)
        while len(self.history) < recipe.epochs:
            order = torch.randperm(len(y), generator=self.generator)
            found = descend(
                self.model,
                self.optimizer,
                x,
                y,
                torch.split(order, recipe.batch_size),
                lambda _: recipe.rate(self.run.lr, len(self.history)),
                augment=augment if recipe.augment else None,
                on_step=on_step,
            )
            test = found
            if math.isfinite(found.loss):
                test = evaluate(self.model, data.test_x, data.test_y)
            norm = weight_norm(self.model)
            rate = recipe.rate(self.run.lr, len(self.history))
            self.history.append((rate, found.loss, found.accuracy, test.loss, test.accuracy, norm))
            self.seconds = time.perf_counter() - start
            if self.diverged:
                return
            if len(self.history) in recipe.checkpoints:
                self.save_weights(folder)
            self.save(folder / STATE)

    @property
    def diverged(self) -> bool:
        """Whether a loss, or the norm of the weights, of the last epoch is not finite."""
        return not all(math.isfinite(value) for value in self.history[-1])

    def save_weights(self, folder: Path) -> None:
        """Write the weights to the file of the epoch."""
        epoch = len(self.history)
        weights.save(
            folder / f"epoch-{epoch:03}.safetensors", self.model, run=self.run, epoch=epoch
        )

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and momentum by their names in the state; the model's own tensors."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if "momentum_buffer" not in state:  # before the first step, or about to be restored
                state["momentum_buffer"] = torch.zeros_like(parameter)
            found[f"momentum.{name}"] = state["momentum_buffer"]
        return found

    def settings(self) -> dict[str, Any]:
        """All that decides the weights."""
        return {**self.recipe.training(), "data": self.data.fingerprint, "run": self.run.name}

    def save(self, path: Path) -> None:
        """Write the state."""
        others = {
            "generator": self.generator.get_state(),
            "history": torch.tensor(self.history, dtype=torch.float64),
        }
        about = {"settings": self.settings(), "seconds": self.seconds}
        weights.write(path, {**self.tensors(), **others}, about)

    def restore(self, path: Path) -> None:
        """Read the state that ``save`` wrote, or raise ValueError if its settings differ."""
        tensors, about = weights.read(path)
        found, wanted = about["settings"], json.loads(json.dumps(self.settings()))
        if odd := [name for name in wanted if found.get(name) != wanted[name]]:
            was, now = (
                ", ".join(f"{name}={table.get(name)!r}" for name in odd)
                for table in (found, wanted)
            )
            raise InputError(
                f"{path} was trained with {was}, not {now}; use the same or another folder"
            )
        self.history = [tuple(row) for row in tensors.pop("history").tolist()]
        self.generator.set_state(tensors.pop("generator"))
        weights.copy_(path, tensors, self.tensors())
        self.seconds = about["seconds"]

    def record(self) -> Training:
        """The record of a training that ended."""
        network = self.run.network
        last = dict(zip(CURVES, self.history[-1], strict=True))
        status = TRAINED
        if self.diverged:
            status = DIVERGED
        elif last["train_accuracy"] < GUESSING / self.data.classes:
            status = UNTRAINED
        columns = torch.tensor(self.history, dtype=torch.float64).T
        return Training(
            network.depth,
            network.variant,
            self.run.seed,
            self.run.lr,
            status,
            **dict(zip(CURVES, columns, strict=True)),
            seconds=self.seconds,
        )


def weight_norm(model: nn.Module) -> float:
    """The 2-norm of all parameters, summed in float64."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64))


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let cuDNN use only algorithms that give the same bits each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
