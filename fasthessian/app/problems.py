"""The problems that ``fasthessian analyze`` accepts: built-in ones and the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import InputError
from fasthessian.study import data as images
from fasthessian.study.resnet import resnet
from fasthessian.study.sgd import OnStep, evaluate, train


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of a built-in problem; None means the problem's default."""

    data: str | os.PathLike[str] | None = None  # CIFAR folder
    epochs: int | None = None
    train_images: int | None = None  # per epoch, at most
    lr: float | None = None  # learning rate
    samples: int | None = None  # training images that define the loss to analyse
    batch_size: int | None = None  # images per batch of the analysis
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A point in parameter space and the loss around it, ready for ``fh.Hessian``."""

    name: str
    model: Any
    criterion: Any
    data: Any
    info: dict[str, Any]  # plain JSON: what the problem is and how it was trained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One built-in problem: its network, its images and how long to train."""

    about: str
    make: Callable[[int], nn.Module]  # number of classes -> model
    size: int  # side of the digits
    channels: int
    epochs: int
    train_images: int
    samples: int
    batch_size: int
    lr: float
    cifar: bool = False  # whether it reads --data


def mlp(classes: int) -> nn.Module:
    """64 -> 32 -> classes with tanh: 2,410 parameters for ten classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, classes))


def logistic(classes: int) -> nn.Module:
    """Softmax regression: a convex loss, whose Hessian has no negative eigenvalue."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


BUILTIN = {
    "resnet20": Recipe(
        "ResNet-20 on 32x32 images (digits, or CIFAR with --data)",
        lambda classes: resnet(20, num_classes=classes),
        size=32,
        channels=3,
        epochs=5,
        train_images=1500,
        samples=128,
        batch_size=128,
        lr=0.1,
        cifar=True,
    ),
    "mlp-digits": Recipe(
        "two-layer perceptron on 8x8 digits, takes seconds",
        mlp,
        size=8,
        channels=1,
        epochs=20,
        train_images=1437,
        samples=1437,
        batch_size=1437,
        lr=0.1,
    ),
    "logistic-digits": Recipe(
        "softmax regression on 8x8 digits, convex, takes seconds",
        logistic,
        size=8,
        channels=1,
        epochs=20,
        train_images=1437,
        samples=1437,
        batch_size=1437,
        lr=0.1,
    ),
}


def load(
    spec: str, settings: Settings, progress: OnStep | None = None, ranks: Ranks = ALONE
) -> Problem:
    """The problem called ``spec``: a built-in one, trained here, or ``module:function``.

    Each of several ``ranks`` trains, as nobody then waits for the length of a training. Machines
    may round differently, so all go on with the model of the first rank.

    Args:
        spec: a key of `BUILTIN`, or a function to import. The function is called without arguments
            and returns ``model, criterion, data`` as `fasthessian.Hessian` takes them. The current
            folder is searched first.
        settings: data, training length, samples and seed.
        progress: called with (training steps done, steps in all).
        ranks: those of the job.

    Raises:
        ValueError: the problem, module or function does not exist, the function returns something
            else, the problem does not take a setting, or the data cannot be read.
    """
    if ":" in spec:
        return ranks.together(lambda: own(spec, settings))
    problem = ranks.together(lambda: trained(spec, settings, progress))
    for tensor in problem.model.state_dict().values():
        tensor.copy_(ranks.rows(tensor.reshape(-1))[0].view(tensor.shape))
    return problem


def trained(spec: str, settings: Settings, progress: OnStep | None = None) -> Problem:
    """A built-in problem, trained here."""
    if spec not in BUILTIN:
        raise InputError(
            f"no problem {spec!r}; use {', '.join(BUILTIN)}, or module:function of your own"
        )
    recipe = BUILTIN[spec]
    if settings.data is None:
        dataset = images.digits(size=recipe.size, channels=recipe.channels, seed=settings.seed)
    elif recipe.cifar:
        dataset = images.cifar(settings.data)
    else:
        raise InputError(f"{spec} takes no --data; use resnet20")

    def choice(name: str) -> int:
        given = getattr(settings, name)
        value: int = getattr(recipe, name) if given is None else given
        return value

    samples, batch_size = choice("samples"), choice("batch_size")
    count = len(dataset.train_y)
    if settings.samples is None:
        samples = min(samples, count)
    batches = images.subset(dataset.train_x, dataset.train_y, samples, batch_size, settings.seed)
    lr = recipe.lr if settings.lr is None else settings.lr
    if not 0 < lr < math.inf:
        raise InputError(f"lr={lr} is not a positive number")
    with seeded(settings.seed):
        model = recipe.make(dataset.classes)
    history = train(
        model,
        dataset.train_x,
        dataset.train_y,
        epochs=choice("epochs"),
        lr=lr,
        limit=choice("train_images"),
        seed=settings.seed,
        progress=progress,
    )
    test = evaluate(model, dataset.test_x, dataset.test_y)
    info = {
        "about": recipe.about,
        "data": dataset.name,
        "train_images": count,
        "train_images_per_epoch": min(count, choice("train_images")),
        "test_images": len(dataset.test_y),
        "epochs": [dataclasses.asdict(epoch) for epoch in history],
        "test": dataclasses.asdict(test),
        "samples": samples,
    }
    return Problem(spec, model, nn.CrossEntropyLoss(), batches, info)


def own(spec: str, settings: Settings) -> Problem:
    """Import ``module:function`` and call it; its own errors pass through."""
    for field in ("data", "epochs", "train_images", "lr", "samples", "batch_size"):
        if getattr(settings, field) is not None:
            option = "--" + field.replace("_", "-")
            raise InputError(f"{option} is for built-in problems; {spec} brings its own data")
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InputError(f"{spec!r} is not module:function")
    if "/" in module_name or os.sep in module_name or name == "py":
        stem = os.path.splitext(os.path.basename(module_name))[0]
        raise InputError(
            f"{module_name!r} is not a module name; from its folder write {stem}:{name}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with seeded(settings.seed):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the user's module exists, but a module that it imports is missing
            stem = module_name.removesuffix(".py")
            way = "" if stem == module_name else f"; from its folder write {stem}:{name}"
            raise InputError(
                f"no module {module_name!r} here ({os.getcwd()}) or on the Python path{way}"
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"module {module_name!r} has no function {name!r}")
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise InputError(f"{spec} must be callable without arguments: {error}") from error
        result = function()
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        found = type(result).__name__
        if isinstance(result, (tuple, list)):
            found += f" of {len(result)}"
        raise InputError(f"{spec} returned a {found}; expected model, criterion, data")
    model, criterion, batches = result
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{spec} returned a {type(model).__name__} as the model; expected a torch.nn.Module"
        )
    return Problem(spec, model, criterion, batches, {"about": f"{name}() of module {module_name}"})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside, and restore them afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
