"""``fasthessian study --list``: what each figure needs, what the study costs, and what is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from fasthessian.app.study_progress import duration
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.study.carry_out import is_done
from fasthessian.study.descents import Descent
from fasthessian.study.figures import KINDS, missing
from fasthessian.study.networks import Network
from fasthessian.study.recipes import Recipe
from fasthessian.study.schedule import (
    DESCEND,
    MEASURE,
    SKIPPED,
    SURFACE,
    TRAIN,
    Images,
    Speed,
    Task,
    descent_gradient,
    gradient_cost,
    tasks,
)  # fmt: skip
from fasthessian.study.store import Folder

STEPS = (TRAIN, MEASURE, SURFACE, DESCEND)
# Figures need networks that are trained and analysed, except these.
TAKES = {"testing-curves": "1", "landscape": "1-3", "landscape-epochs": "1-3",
         "edge-of-stability": "4"}  # fmt: skip
REPEATS = 3


class Row(NamedTuple):
    """The tasks of one kind for all networks of one depth, or all descents."""

    step: int  # position in STEPS, from 1
    kind: str
    depth: int | None  # None for descents
    tasks: int
    done: int
    passes: float  # of gradients over all training images, of the tasks that are not done
    seconds: float  # that these take


def listed(
    networks: Sequence[Network], recipe: Recipe, images: Images, folder: Folder,
    device: torch.device, descents: Sequence[Descent] = (),
) -> list[Row]:  # fmt: skip
    """What there is to do, by kind of task and depth.

    Times follow from what is done, or else from the time of one gradient for each depth.
    """
    found = folder.results()
    trainings = {each.run: each for each in found.trainings}
    plan = [
        task
        for task in tasks(networks, recipe.seeds, recipe, images, trainings, descents)
        if task.state != SKIPPED
    ]
    speed = Speed.of(found, plan)
    if plan and speed.seconds(plan[0]) is None:
        for network in {Network(network.depth) for network in networks}:
            cost, seconds = timed(network, recipe, device)
            speed.add(TRAIN, cost, seconds)
    rows = []
    groups: dict[tuple[int, int | None], list[Task]] = {}
    for task in plan:
        depth = None if isinstance(task.run, Descent) else task.run.network.depth
        groups.setdefault((STEPS.index(task.kind), depth), []).append(task)
    for (step, depth), part in sorted(
        groups.items(), key=lambda group: (group[0][0], group[0][1] or 0)
    ):
        left = [each for each in part if not is_done(folder, each)]
        gradient = descent_gradient()
        if depth is not None:
            gradient = gradient_cost(Network(depth), recipe)
        passes = sum(each.cost for each in left) / (gradient * images.train)
        seconds = sum(speed.seconds(each) or 0.0 for each in left)
        done = len(part) - len(left)
        rows.append(Row(step + 1, STEPS[step], depth, len(part), done, passes, seconds))
    return rows


def timed(network: Network, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Cost and seconds of one gradient of a batch of random images, the best of some."""
    with seeded(0):
        model = network.make(10, recipe.width)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(recipe.batch_size, 3, 32, 32, device=device)
    y = torch.zeros(recipe.batch_size, dtype=torch.long, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        grads[0].sum().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return recipe.batch_size * gradient_cost(network, recipe), min(times)


def show_list(rows: Sequence[Row], folder: Folder, as_json: bool) -> None:
    """Print figures with what they need, and the work with its time."""
    lacks = missing(folder.results())
    figures = [(kind, TAKES.get(kind.name, "1-2"), lacks.get(kind.name, "")) for kind in KINDS]
    if as_json:
        needs = [
            {
                "figure": kind.name,
                "paper": kind.paper,
                "needs": kind.needs,
                "steps": steps,
                "lacks": lack,
            }
            for kind, steps, lack in figures
        ]
        work = [row._asdict() for row in rows]
        click.echo(json.dumps({"figures": needs, "work": work}, indent=1))
        return
    console = Console()
    table = Table(title="Figures", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("figure", "paper", "steps", "needs", "now"):
        table.add_column(name)
    for kind, steps, lack in figures:
        table.add_row(kind.name, kind.paper, steps, kind.needs, lack or "yes")
    console.print(table)
    console.print(work_table(rows))
    left = sum(row.seconds for row in rows)
    console.print(
        f"passes: gradients over all training images\n"
        f"about {duration(left)} left for one process; several share it",
        highlight=False,
    )


def work_table(rows: Sequence[Row]) -> Table:
    """The work, one line per kind of task and depth."""
    table = Table(title="\nWork", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("step")
    for name in ("depth", "tasks", "done", "passes left", "time left"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.depth, row.tasks, row.done, f"{row.passes:,.0f}", duration(row.seconds))
        table.add_row(f"{row.step} {row.kind}", *map(str, numbers))
    return table
