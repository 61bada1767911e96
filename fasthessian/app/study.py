"""The command ``fasthessian study``: its options, and what they ask for."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import click

from fasthessian.errors import InputError
from fasthessian.study.networks import VARIANTS
from fasthessian.study.recipes import RECIPES, Recipe

OUT = "study"

HELP = f"""Reproduce the study of the PyHessian paper on CIFAR images: train, analyse, draw.

The paper (Yao et al. 2020, arXiv:1912.07145) compares residual networks with and without batch
normalisation and residual connections by the Hessian of their loss. This command trains these
networks, measures the largest eigenvalues, the trace, the spectral density and the loss landscape
at some epochs, and says of each claim of the paper whether the numbers confirm it.

\b
Variants:
  {", ".join(list(VARIANTS)[:3])}
  {", ".join(list(VARIANTS)[3:6])}
  {", ".join(list(VARIANTS)[6:])}

\b
The folder --out holds afterwards:
  report.html          open it in a browser; nothing is loaded from outside
  figures/, tables/    each figure as PNG and SVG, each table as CSV and Markdown
  runs/                for each training: weights, curves and measurements as JSON
  study.json           all settings; a folder of a study with other settings is refused

The same command goes on where an earlier one was stopped, by Ctrl-C, a kill, a full disk or
--time-limit, and does only what is missing. So a study can also be extended: add depths, variants
or seeds, and use the same folder. With the same seeds, the same machine and the same number of
threads the weights are the same to the bit.

Each initial rate is tried with the first seed, and the one with the best accuracy on the test
images is kept for the other seeds. The kept runs are analysed. A network that diverges with all
rates is reported as such.

`fasthessian study --list` with the same options says what each figure needs, how much of that is
done, and how long the rest takes; --recipe paper is for GPUs.

\b
Examples:
  fasthessian study --data cifar-10-batches-bin
  fasthessian study --data cifar-10-batches-bin --depth 20 32 --variants resnet no-bn no-res
  fasthessian study --data cifar-10-batches-bin --epochs 5 --lrs 0.05 --time-limit 3000
  fasthessian study --data cifar-10-batches-bin --edge-of-stability 0.067 0.05 0.033
  fasthessian study --data cifar-10-batches-bin --depth 20 32 38 56 --recipe paper --list
  torchrun --nproc-per-node 8 -m fasthessian study --data cifar-10-batches-bin --recipe paper
"""


class Several(click.Command):
    """A command whose repeatable options also take several values: ``--depth 20 32``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read ``--depth 20 32`` as ``--depth 20 --depth 32``."""
        names = {
            name
            for each in self.params
            if isinstance(each, click.Option) and each.multiple
            for name in each.opts
        }
        spread: list[str] = []
        option, values = "", 0  # the repeatable option that was named last, and its values so far
        for arg in args:
            if arg.startswith("--"):
                name, given, _ = arg.partition("=")
                option, values = name if name in names else "", int(bool(given))
            elif option:
                spread += [option] if values else []
                values += 1
            spread.append(arg)
        return super().parse_args(ctx, spread)


def explanations(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each attribute.

    Example:
        >>> explanations(Recipe)["momentum"]
        'of SGD, in [0, 1).'
    """
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every number of a recipe."""
    hints, words = typing.get_type_hints(Recipe), explanations(Recipe)
    for field in reversed(dataclasses.fields(Recipe)):
        if field.name == "name":
            continue
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # a number or None
            kind = typing.get_args(kind)[0]
        several = typing.get_origin(kind) is tuple
        if several:
            kind = typing.get_args(kind)[0]
        option = option_of(field.name)
        numbers = [f"{name} {shown(getattr(each, field.name))}" for name, each in RECIPES.items()]
        about = words[field.name]
        command = click.option(
            f"{option}/--no-{option[2:]}" if kind is bool else option,
            type=kind,
            default=None,
            multiple=several,
            metavar=None if kind is bool else "NUMBERS" if several else "NUMBER",
            help=f"{about[0].upper()}{about[1:]}  [{', '.join(numbers)}]",
        )(command)
    return command


def shown(value: Any) -> str:
    """A number of a recipe in words."""
    if isinstance(value, tuple):
        return " ".join(f"{each:g}" for each in value)
    if value is None:
        return "all"
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}"


def in_options(message: str) -> str:
    """The message with options in place of the numbers of a recipe.

    Example:
        >>> in_options("images=70 is above the 60 images of the training")
        '--images 70 is above the 60 images of the training'
    """
    names = "|".join([*(field.name for field in dataclasses.fields(Recipe)), "edge_of_stability"])

    def named(found: re.Match[str]) -> str:
        return option_of(found[1] or found[2]) + (" " if found[0].endswith("=") else "")

    return re.sub(rf"\b({names})=|^({names}|out)(?=: | must)", named, message)


def option_of(name: str) -> str:
    """The option of a number of a recipe."""
    return "--" + name.replace("_", "-")


@click.command(name="study", cls=Several, help=HELP)
@click.option(
    "--data",
    metavar="DIR",
    help="Folder with the files of CIFAR-10, CIFAR-100, MNIST or Fashion-MNIST; or digits, the "
    "small images of scikit-learn.",
)
@click.option(
    "--depth",
    type=int,
    multiple=True,
    default=(20,),
    metavar="NUMBERS",
    help="Depths, each 6 m + 2: 20 32 38 56 in the paper.",
)
@click.option(
    "--variants",
    multiple=True,
    default=("resnet", "no-bn", "no-res"),
    metavar="NAMES",
    help="Variants of the networks, from the list above.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="laptop",
    help="Where the numbers below come from; each may be changed.",
)
@recipe_options
@click.option(
    "--edge-of-stability",
    type=float,
    multiple=True,
    metavar="RATES",
    help="Also draw how sharp the loss of a small network becomes under gradient descent at these "
    "constant rates, and under SGD at the first: 0.067 0.05 0.033 on CIFAR-10, for example.",
)
@click.option(
    "--out", metavar="DIR", default=OUT, help="Folder of the study, new or of this study."
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Stop in time, with all results so far in the report and exit code 0; the same command "
    "goes on.",
)
@click.option(
    "--device",
    help="Where to compute, such as cpu or cuda:1; without it, a GPU if there is one. Under "
    "torchrun each rank takes the GPU of its number.",
)
@click.option("--list", "only_list", is_flag=True, help="Show needs and costs, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def study_command(**options: Any) -> None:
    """Read the options, and carry out or list the study."""
    from fasthessian.app.study_work import study

    try:
        study(options)
    except InputError as error:
        raise InputError(in_options(str(error))) from error
