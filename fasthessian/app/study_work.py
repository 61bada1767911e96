"""Carries out ``fasthessian study``: from its options to the report."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import platform
from typing import Any

import click
import torch

from fasthessian.__about__ import __version__
from fasthessian.app.delivery import Interrupted, Unfinished
from fasthessian.app.progress import stderr
from fasthessian.app.study_delivery import check_packages, deliver
from fasthessian.app.study_list import listed, show_list
from fasthessian.app.study_progress import Overview
from fasthessian.distributed.launch import is_first, several
from fasthessian.errors import InputError, Stopped
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.study import data as images
from fasthessian.study.carry_out import Asked, Limits, carry_out
from fasthessian.study.descents import descents
from fasthessian.study.networks import Network
from fasthessian.study.recipes import RECIPES, Recipe
from fasthessian.study.schedule import Images
from fasthessian.study.store import Folder

OFFICIAL = {
    "training images": 50_000,
    "test images": 10_000,
}  # images of CIFAR, if no others are given
RESERVE = 60.0  # seconds of a time limit that are left for figures and report,
SHARE = 0.1  # or this part of it, if that is less


def study(options: dict[str, Any]) -> None:
    """Carry out or list the study that the options of the command name."""
    recipe = recipe_of(options)
    networks = networks_of(options, recipe)
    limit = options["time_limit"]
    if limit is not None and not 0 < limit < math.inf:
        raise InputError(f"--time-limit must be a positive number, got {limit}")
    limits = Limits(None if limit is None else limit - min(RESERVE, SHARE * limit))
    if options["data"] is None and not options["only_list"]:
        raise InputError("--data is missing; give a folder of images, or digits")
    device = device_of(options["device"])
    data = None if options["data"] is None else loaded(options["data"], recipe)
    folder = Folder(options["out"], settings_of(recipe, data, device))
    known = folder.settings.get("data", OFFICIAL)
    counts = Images(known["training images"], known["test images"])
    followed = descents(options["edge_of_stability"], counts.train)
    if data is None or options["only_list"]:
        rows = listed(networks, recipe, counts, folder, device, followed)
        show_list(rows, folder, options["as_json"])
        return
    check_packages()
    asked = Asked(networks, recipe, on(device, data), followed)
    ranks = int(os.environ["WORLD_SIZE"]) if several() else 1
    ending = f"the same command goes on; results so far are in {folder.root}"
    stopped, failed = "", []
    try:
        with Overview(stderr()) as overview, limits:
            folder.begin()
            try:
                failed = carry_out(asked, folder, limits, overview, ranks)
            except Stopped as error:
                stopped = str(error)
        if is_first() and not limits.signalled:
            deliver(folder, options["as_json"])
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {ending}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = f"{error.filename or folder.root}: {error.strerror or error}"
        raise Unfinished(f"{words}; {'make room, and ' * full}{ending}") from error
    if stopped and is_first():
        click.echo(f"{stopped}; {ending}", err=True)
    if failed:
        raise Unfinished(f"{len(failed)} of the analyses failed, the first one: {failed[0]}")


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe that is named, with the numbers that are given."""
    names = [field.name for field in dataclasses.fields(Recipe) if field.name != "name"]
    given = {name: options[name] for name in names if options[name] not in (None, ())}
    return RECIPES[options["recipe"]].changed(**given)


def networks_of(options: dict[str, Any], recipe: Recipe) -> list[Network]:
    """Every variant in every depth, or an error that names what does not exist."""
    for depth in options["depth"]:
        with seeded(0):
            Network(depth).make(10, recipe.width)
    return [Network(depth, name) for depth in options["depth"] for name in options["variants"]]


def loaded(folder: str, recipe: Recipe) -> images.ImageData:
    """The images, after checks that the recipe can work with them."""
    data = images.load(folder)
    recipe.check_images(len(data.train_y))
    return data


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU of this rank if there is one."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        words = str(error).partition("\n")[0]
        raise InputError(f"--device {name} cannot be used ({words}); leave it out") from error
    return device


def on(device: torch.device, data: images.ImageData) -> images.ImageData:
    """The images on a device."""
    names = ("train_x", "train_y", "test_x", "test_y")
    moved = {name: getattr(data, name).to(device) for name in names}
    return dataclasses.replace(data, **moved)


def settings_of(
    recipe: Recipe, data: images.ImageData | None, device: torch.device
) -> dict[str, Any]:
    """What the folder of a study says of it, as plain JSON; of data only if there are some."""
    numbers = dataclasses.asdict(recipe)
    named, seeds = numbers.pop("name"), numbers.pop("seeds")
    begun = {
        "recipe": named,
        "seeds": seeds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_words(device),
    }
    settings = {"version": __version__, "recipe": numbers, "begun": begun}
    if data is not None:
        settings["data"] = {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "training images": len(data.train_y),
            "test images": len(data.test_y),
        }
    return settings


def device_words(device: torch.device) -> str:
    """The name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
