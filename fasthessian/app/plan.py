"""The command ``fasthessian plan``: its options, and what they ask for."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fasthessian.app.plan_report import as_json_types, show
from fasthessian.errors import InputError
from fasthessian.planning.machines import GB, LATENCY, MACHINES, REACHED, TFLOPS, Machine
from fasthessian.planning.model import LARGEST, PER_GRADIENT, WRAPS, seconds_of_flops
from fasthessian.planning.plan import MOST, Asked, plan
from fasthessian.planning.steps import BASES, PARAMETERS

F = TypeVar("F", bound=Callable[..., Any])
GIB = 1 << 30
HERE = "here"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
NAMED = "\n".join(f"  {name:<6} {machine.about}" for name, machine in MACHINES.items())

HELP = f"""Show what a run will need before it starts: memory, collectives, time.

Nothing is computed. The plan compares ways to keep the Krylov basis (full, compressed, offload,
none; on every rank or sharded over the ranks) and ways to wrap the model. It recommends one and
says how much wall time to ask for, how large a checkpoint is, and the largest problem that fits.

\b
All times and sizes are estimates:
  - Bandwidths are used in full. Computing and communication do not overlap.
  - Figures of a named machine are peaks of its data sheet.
  - A product takes what you measured (--product-seconds, or --gradient-seconds times
    {PER_GRADIENT}), or what its operations take (--samples). Otherwise it is not known, and times
    are without it.
  - Kept graphs are those of your model. They count only with --activation-memory.

\b
Machines, one GPU per rank:
{NAMED}
  {HERE:<6} this machine: free memory, and its bandwidth measured in a second

\b
Columns, all for one rank and a step in the middle of the run:
  memory       of its device: model and Krylov space
  calls, sent  collectives, and bytes that it sends, with the parameters that are gathered
  step, run    times; "+": on top of a product, whose time is not known
  most         the largest model, and the most steps, that fit if all else stays as it is

\b
Examples:
  fasthessian plan --params 1.3e9 --ranks 64 --machine h100 --product-seconds 0.9
  fasthessian plan --params 7B --ranks 64 --ranks-per-node 8 --dtype bfloat16 --machine h200
  fasthessian plan --params 350M --ranks 4 --memory 40 --bandwidth 12 --memory-bandwidth 1500
  fasthessian plan --params 7B --ranks 64 --steps 100 --basis compressed --bandwidth 50 --json
  fasthessian plan --params 11M --machine here --gradient-seconds 0.4 --pairs 5
"""


def count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A count such as 7e9, 7B, 350M or 11,173,962; at least 1."""
    if value is None:
        return None
    match = re.fullmatch(r"([\d.]+(?:E\+?\d+)?)([KMBGT]?)", re.sub("[,_ ]", "", value).upper())
    try:
        number = float(match[1]) * UNITS[match[2]] if match else 0.0
    except ValueError:
        number = 0.0
    if not 1 <= number < MOST or number != int(number):
        raise click.BadParameter(f"{value!r} is not a count such as 7e9, 7B, 350M or 11173962")
    return int(number)


def positive(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A finite number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a positive number")
    return value


def number(*names: str, help: str) -> Callable[[F], F]:
    """An option for a positive number that may be left out."""
    return click.option(*names, type=float, callback=positive, metavar="NUMBER", help=help)


@click.command(name="plan", help=HELP)
@click.option(
    "--params",
    required=True,
    callback=count,
    metavar="COUNT",
    help="Parameters of the model: 7e9, 7B, 350M or 11173962.",
)
@click.option("--ranks", type=click.IntRange(1), default=1, help="Processes, one per GPU.")
@click.option(
    "--ranks-per-node",
    type=click.IntRange(1),
    help="Ranks on a node; without it, that of the machine, or one.",
)
@click.option("--steps", type=click.IntRange(1), default=100, help="Lanczos steps.")
@click.option(
    "--pairs",
    type=click.IntRange(0),
    default=0,
    help="Eigenvectors wanted; 0 for a density or a trace.",
)
@click.option(
    "--basis",
    type=click.Choice(BASES),
    help="How Lanczos vectors are kept; without it, all ways are compared. none: not at all, for "
    "a density without eigenvectors. For the others see fasthessian analyze --help.",
)
@click.option(
    "--wrap",
    type=click.Choice(WRAPS),
    help="plain: the model on every rank. unshard: fully_shard, gathered for the run. regather: "
    "fully_shard, modules gathered for each product. Without it, all are compared.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(PARAMETERS)),
    default="float32",
    help="Of the parameters. Vectors are float64 for float64, and float32 otherwise.",
)
@click.option(
    "--machine",
    type=click.Choice([*MACHINES, HERE]),
    help="Where to run; the options below replace its figures.",
)
@number("--memory", help="GiB of a rank's device.")
@number("--memory-bandwidth", help="GB/s of this memory.")
@number("--bandwidth", help="GB/s of a rank's network, in one direction.")
@number("--node-bandwidth", help="GB/s between ranks of a node, in one direction.")
@click.option(
    "--latency",
    type=float,
    callback=positive,
    metavar="NUMBER",
    help=f"Microseconds of a collective, times log2 of the ranks.  [default: {LATENCY * 1e6:g}]",
)
@number("--host-memory", help="GiB of a rank's host, for --basis offload.")
@number("--host-bandwidth", help="GB/s from host to device.")
@number("--disk-bandwidth", help="GB/s of the file system, all ranks together.")
@number("--product-seconds", help="Time of one product on a rank, as you measured it.")
@number(
    "--gradient-seconds",
    help=f"Time of one gradient, from which a product is {PER_GRADIENT} times that.",
)
@click.option(
    "--samples",
    callback=count,
    metavar="COUNT",
    help="Samples of a rank per product (tokens of a language model). A product then takes "
    "12 x parameters x samples operations.",
)
@number("--flops", help=f"TFLOP/s that a rank reaches; else {REACHED:.0%} of its data sheet.")
@number("--activation-memory", help="GiB of a rank for kept graphs and all else of your model.")
@click.option(
    "--largest-module",
    callback=count,
    metavar="COUNT",
    help="Parameters of the largest module that fully_shard wraps; without it, "
    f"{LARGEST:.0%} of all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan_command(as_json: bool, **options: Any) -> None:
    """Read the options, make the plan and show it."""
    machine = machine_of(options)
    asked = asked_of(options, machine)
    bases = BASES if options["basis"] is None else (options["basis"],)
    wraps = WRAPS if options["wrap"] is None else (options["wrap"],)
    made, said = plan(asked, bases, wraps), notes(options, asked)
    if as_json:
        click.echo(json.dumps(as_json_types(made, said), indent=1, allow_nan=False))
    else:
        show(made, said)


def machine_of(options: dict[str, Any]) -> Machine:
    """The machine that is named, with the figures that are given."""
    name = options["machine"]
    if name == HERE:
        from fasthessian.app.this_machine import this_machine

        machine = this_machine(options["ranks_per_node"] or options["ranks"])
    else:
        machine = MACHINES.get(name, Machine())
    units = {
        "memory": GIB, "host_memory": GIB, "memory_bandwidth": GB, "bandwidth": GB,
        "node_bandwidth": GB, "host_bandwidth": GB, "disk_bandwidth": GB, "latency": 1e-6,
        "ranks_per_node": 1,
    }  # fmt: skip
    given = {key: options[key] * unit for key, unit in units.items() if options[key] is not None}
    return dataclasses.replace(machine, **given)


def asked_of(options: dict[str, Any], machine: Machine) -> Asked:
    """What is asked for, with the time of a product if it follows from the options."""
    n, dtype = options["params"], options["dtype"]
    module = options["largest_module"]
    if module is not None and module > n:
        raise InputError(f"--largest-module {module} is more than the {n} of --params")
    return Asked(
        n=n,
        machine=machine,
        ranks=options["ranks"],
        steps=options["steps"],
        pairs=options["pairs"],
        dtype=dtype,
        product_seconds=product_seconds(options, machine),
        activations=int((options["activation_memory"] or 0) * GIB),
        largest=LARGEST if module is None else module / n,
    )


def product_seconds(options: dict[str, Any], machine: Machine) -> float | None:
    """The time of a product: as measured, from a gradient, or from its operations."""
    names = ("product_seconds", "gradient_seconds", "samples")
    given = ["--" + name.replace("_", "-") for name in names if options[name] is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say how long a product takes; give one")
    if options["samples"] is None:
        if options["flops"] is not None:
            raise InputError("--flops needs the samples of a product; give --samples as well")
        measured: float | None = options["product_seconds"]
        gradient: float | None = options["gradient_seconds"]
        return measured if gradient is None else PER_GRADIENT * gradient
    rate = machine.rate(options["dtype"]) if options["flops"] is None else options["flops"] * TFLOPS
    if rate is None:
        raise InputError(
            "--samples needs a rate of operations; give --flops as well, or --machine h100"
        )
    return seconds_of_flops(options["params"], options["samples"], rate)


def notes(options: dict[str, Any], asked: Asked) -> list[str]:
    """What the plan assumes, and what it does not know."""
    said = ["times and memory are estimates: full bandwidths, no overlap, no fragmentation"]
    name, machine = options["machine"], asked.machine
    if name in MACHINES:
        said.append(f"{name}: figures of a data sheet, {machine.about}; real rates are lower")
    elif name == HERE:
        said.append(f"{HERE}: {machine.about}")
    if asked.steps > asked.n:
        said.append(
            f"only {asked.n} of {asked.steps} steps can be made: a space has n rows at most"
        )
    if asked.product_seconds is None:
        said.append("the time of a product is not known; give --product-seconds or --samples")
    elif options["samples"] is not None and options["flops"] is None:
        said.append(f"products are assumed to reach {REACHED:.0%} of the peak rate")
    if not asked.activations:
        said.append("graphs and activations are not counted; give --activation-memory")
    if (
        options["largest_module"] is None
        and asked.ranks > 1
        and options["wrap"] in (None, WRAPS[2])
    ):
        said.append(f"the largest module is assumed to have {LARGEST:.0%} of the parameters")
    if asked.ranks > 1 and options["latency"] is None:
        said.append(f"collectives are assumed to take {LATENCY * 1e6:g} us per doubling of ranks")
    if machine.memory is None:
        said.append("the memory is not known; give --memory")
    if options["basis"] in (None, "offload") and machine.gpu and machine.host_memory is None:
        said.append("the memory of the host is not known; give --host-memory")
    single = asked.ranks == machine.sharing_node(asked.ranks) and machine.node_bandwidth
    if asked.ranks > 1 and machine.bandwidth is None and not single:
        said.append("the network is not known; give --bandwidth")
    if machine.memory_bandwidth is None:
        said.append("the bandwidth of the memory is not known; give --memory-bandwidth")
    return said
