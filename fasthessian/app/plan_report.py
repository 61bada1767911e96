"""The plan as JSON and as tables on the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasthessian.memory import readable
from fasthessian.planning.machines import GB, Machine
from fasthessian.planning.plan import Asked, Choice, Plan

FORMAT = "fasthessian plan 1"
SIGNAL = 120  # seconds before the end of the job at which the scheduler signals, at least
GRACE = 30  # seconds from SIGTERM until torchrun kills its ranks
LAYOUTS = {False: "replicated", True: "sharded"}
UNKNOWN = "?"


def as_json_types(plan: Plan, notes: Sequence[str]) -> dict[str, Any]:
    """The whole plan: bytes, seconds, and bytes per second; null is what is not known."""
    taken = plan.recommended
    settings = dataclasses.asdict(plan.asked)
    return {
        "format": FORMAT,
        "machine": settings.pop("machine"),
        "asked": settings,
        "choices": [choice_types(each) for each in plan.choices],
        "recommended": None if taken is None else choice_types(taken),
        "enough_ranks": plan.enough_ranks,
        "notes": list(notes),
    }


def choice_types(choice: Choice) -> dict[str, Any]:
    """One choice as JSON types, with the sums of its parts."""
    content = dataclasses.asdict(choice)
    content["collectives"] = [list(each) for each in choice.collectives]
    content["device_bytes"] = choice.device_bytes
    content["step"]["total"] = choice.step.total
    content["wall_seconds"] = choice.wall_seconds
    return content


def show(plan: Plan, notes: Sequence[str]) -> None:
    """Print the tables, what to take, what to ask the scheduler for, and the notes."""
    console = Console()

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    say(problem_words(plan.asked))
    say(machine_words(plan.asked.machine))
    shown = plan.recommended or min(plan.choices, key=lambda each: each.device_bytes)
    kept = shown.basis, shown.sharded
    say(f"\nKrylov space, with the model wrapped: {shown.wrap}")
    console.print(table_of([each for each in plan.choices if each.wrap == shown.wrap], shown))
    if plan.asked.ranks > 1:
        say(f"\nModel, with the basis: {shown.basis}, {LAYOUTS[shown.sharded]}")
        same = [each for each in plan.choices if (each.basis, each.sharded) == kept]
        console.print(table_of(same, shown))
    say("")
    for line in advice(plan):
        say(line)
    for note in notes:
        say(f"note: {note}")


def problem_words(asked: Asked) -> str:
    """The problem in one line."""
    on = "1 rank" if asked.ranks == 1 else f"{asked.ranks:,} ranks"
    pairs = f", {asked.pairs} eigenvectors" if asked.pairs else ""
    return f"{asked.n:,} parameters in {asked.dtype} on {on}, {asked.steps:,} Lanczos steps{pairs}"


def machine_words(machine: Machine) -> str:
    """What is known of a rank's machine in one line."""
    rates = (
        ("memory", machine.memory_bandwidth),
        ("network", machine.bandwidth),
        ("inside a node", machine.node_bandwidth),
        ("host to device", machine.host_bandwidth),
        ("file system", machine.disk_bandwidth),
    )
    words = [f"{name} {rate_words(rate)}" for name, rate in rates if rate is not None]
    if machine.memory is not None:
        words.insert(0, f"{readable(machine.memory)} of memory")
    if machine.ranks_per_node is not None:
        words.append(f"ranks per node: {machine.ranks_per_node}")
    return f"each rank: {', '.join(words) or 'nothing is known of its machine'}"


def rate_words(rate: float) -> str:
    """Bytes per second in GB/s.

    Example:
        >>> rate_words(3.35e12), rate_words(2.5e10)
        ('3,350 GB/s', '25 GB/s')
    """
    return f"{rate / GB:,.0f} GB/s" if rate >= 100 * GB else f"{rate / GB:.3g} GB/s"


def table_of(choices: Sequence[Choice], shown: Choice) -> Table:
    """One row per choice; 80 columns wide. Choices differ in their basis or in their wrapping."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    by_wrap = len({each.wrap for each in choices}) > 1
    for name in ("model", "its part") if by_wrap else ("basis", "vectors"):
        table.add_column(name)
    for name in ("memory", "fits", "calls", "sent", "step", "run", "most\nparams", "most\nsteps"):
        table.add_column(name, justify="right")
    for each in choices:
        first = (
            (each.wrap, readable(each.model_bytes))
            if by_wrap
            else (each.basis, LAYOUTS[each.sharded])
        )
        table.add_row(
            *first,
            readable(each.device_bytes),
            fit_words(each),
            str(len(each.collectives)),
            readable(each.sent_bytes + each.gathered_bytes),
            step_words(each),
            duration(each.run_seconds),
            short(each.largest_params),
            short(each.most_steps),
            style="bold" if each is shown else None,
        )
    return table


def fit_words(choice: Choice) -> str:
    """Whether it fits."""
    return UNKNOWN if choice.fits is None else "yes" if choice.fits else "no"


def step_words(choice: Choice) -> str:
    """The time of a step; if the product's is not known, what comes on top of it."""
    step = choice.step
    if step.total is not None or step.product is not None:
        return duration(step.total)
    rest = dataclasses.replace(step, product=0.0).total
    return duration(rest) if rest is None else f"+ {duration(rest)}"


def advice(plan: Plan) -> list[str]:
    """What to take and what to ask the scheduler for, line by line."""
    taken = plan.recommended
    if taken is None:
        largest = max(plan.choices, key=lambda each: each.largest_params or 0)
        ranks = plan.enough_ranks
        more = f"{ranks:,} ranks would do" if ranks else "more ranks do not help"
        return [
            f"nothing fits: {more}; some vectors of full length stay on every rank",
            f"largest model that fits: {short(largest.largest_params)} parameters (basis "
            f"{largest.basis}, {LAYOUTS[largest.sharded]}, model {largest.wrap})",
        ]
    split = f", sharded={taken.sharded}; model: {taken.wrap}" if plan.asked.ranks > 1 else ""
    lines = [f"take: basis='{taken.basis}'{split}"]
    if taken.host_bytes:
        lines.append(f"pinned memory of the host: {readable(taken.host_bytes)} per rank")
    listed = ", ".join(f"{name} of {readable(size)}" for name, size in taken.collectives)
    if listed:
        lines.append(f"collectives of a step in the middle of the run: {listed}")
    if taken.step.total is not None:
        parts = (
            ("product", taken.step.product),
            ("gathers", taken.step.gathers),
            ("memory", taken.step.streams),
            ("collectives", taken.step.collectives),
        )
        lines.append(f"a step: {', '.join(f'{name} {duration(t)}' for name, t in parts if t)}")
    write = taken.checkpoint_seconds
    writing = f", about {duration(write)} to write" if write is not None else ""
    lines.append(f"a checkpoint: {readable(taken.checkpoint_bytes)} in all{writing}; two are kept")
    if taken.wall_seconds is not None:
        early = SIGNAL
        if write is not None and taken.step.total is not None:
            early = max(SIGNAL, 10 * math.ceil((taken.step.total + 2 * write) / 10))
        lines.append(
            f"ask the scheduler for: --time={wall(taken.wall_seconds)} --signal=B:USR1@{early}"
        )
    if write is not None and write > GRACE:
        lines.append(
            f"torchrun kills its ranks {GRACE} s after SIGTERM, before a checkpoint is written: "
            f"only an earlier signal to a rank saves the run (examples/slurm)"
        )
    return lines


def duration(seconds: float | None) -> str:
    """A time with a unit, such as 1.5 s.

    Example:
        >>> [duration(t) for t in (None, 0, 2e-5, 0.25, 90, 4000, 200000)]
        ['?', '0 s', '20 us', '250 ms', '90 s', '66.7 min', '55.6 h']
    """
    if seconds is None:
        return UNKNOWN
    if seconds == 0:
        return "0 s"
    for unit, size, below in (("us", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0)):
        if seconds < below:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def wall(seconds: float) -> str:
    """Wall time in full minutes as Slurm writes it.

    Example:
        >>> wall(61), wall(90000)
        ('00:02:00', '1-01:00:00')
    """
    minutes = math.ceil(seconds / 60)
    days, minutes = divmod(minutes, 24 * 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:00"
    return f"{days}-{clock}" if days else clock


def short(number: int | None) -> str:
    """A count in three digits, rounded down.

    Example:
        >>> [short(n) for n in (None, 0, 950, 12_349, 7_000_000_000)]
        ['?', '0', '950', '12.3K', '7B']
    """
    if number is None:
        return UNKNOWN
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            digits = 10 ** (len(str(number)) - 3)
            return f"{number // digits * digits / size:g}{unit}"
    return str(number)
