"""The commands of ``fasthessian``; ``plan`` and ``study`` have modules of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fasthessian.__about__ import __version__
from fasthessian.app.plan import plan_command
from fasthessian.app.problems import BUILTIN
from fasthessian.app.study import study_command
from fasthessian.distributed.launch import is_first
from fasthessian.errors import InputError
from fasthessian.krylov.basis import FORMATS
from fasthessian.operators.products.engines import ENGINES
from fasthessian.operators.products.options import PRECISIONS

PROBLEMS = "\n".join(f"  {name:<16} {recipe.about}" for name, recipe in BUILTIN.items())

EXAMPLES = """\b
Examples:
  fasthessian analyze mlp-digits
  fasthessian analyze resnet20 --data path/to/cifar-10-batches-bin --out report-cifar
  fasthessian analyze mlp-digits --top 10 --no-landscape --json > spectrum.json
  fasthessian analyze my_script:problem --steps 100 --probes 4
  fasthessian analyze my_script:problem --blocks layer --check --no-density --no-landscape
  fasthessian analyze my_script:problem --matrix ggn --params "^head" --microbatch 32
  fasthessian analyze my_script:problem --checkpoint run --time-limit 3000
  fasthessian analyze my_script:problem --resume run --time-limit 3000
  torchrun --nproc-per-node 2 -m fasthessian analyze my_script:problem --sharded
"""


def once(command: Callable[..., Any] | None) -> Callable[..., Any]:
    """A command that rank 0 carries out alone, if torchrun started several ranks."""
    assert command is not None

    @functools.wraps(command)
    def on_rank_0(*args: Any, **options: Any) -> Any:
        return command(*args, **options) if is_first() else None

    return on_rank_0


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    }
)
@click.version_option(__version__, prog_name="fasthessian")
def cli() -> None:
    r"""Hessian spectra of PyTorch models: eigenvalues, trace, density, loss landscape.

    Start with a built-in problem, which takes seconds, and open report/report.html in a browser:

    \b
      fasthessian analyze mlp-digits

    Then analyze your own model; `fasthessian analyze --help` explains how to pass it:

    \b
      fasthessian analyze my_script:problem
    """


@cli.command(
    help=f"""Compute the Hessian spectrum of PROBLEM and write a report.

\b
PROBLEM is a built-in problem:
{PROBLEMS}
or a function of your own, written module:function. The module is searched in the current folder
first. The function takes no arguments and returns model, criterion, data. The data are one batch
(inputs, targets), a list of batches or a DataLoader. A batch may also be a mapping, with criterion
None, for Hugging Face models, which return their loss.

\b
  # my_script.py
  def problem():
      return model, torch.nn.CrossEntropyLoss(), (inputs, targets)

The report folder holds report.html (open it in a browser), result.json (all numbers) and the
figures. The same seed gives the same numbers.

Several processes, each with its GPU if there are some, share the work if torchrun starts them.
They divide the data that the function returns; if it returns other data on each rank, or a loader
with a DistributedSampler, these are the shares. Rank 0 prints and writes.

\b
  torchrun --nproc-per-node 2 -m fasthessian analyze my_script:problem

{EXAMPLES}"""
)
@click.argument("problem")
@click.option(
    "--data",
    metavar="FOLDER",
    help="Unpacked CIFAR-10 or CIFAR-100 archive, for resnet20; without it, images of digits.",
)
@click.option("--epochs", type=click.IntRange(0), help="Passes over the training images.")
@click.option("--train-images", type=click.IntRange(1), help="Training images per epoch, at most.")
@click.option("--lr", type=float, help="Learning rate of the training.")
@click.option("--samples", type=click.IntRange(1), help="Training images in the analysed loss.")
@click.option("--batch-size", type=click.IntRange(1), help="Images per batch of the analysis.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Seed of all random numbers; the same seed gives the same result.",
)
@click.option(
    "--matrix",
    type=click.Choice(["hessian", "ggn", "fisher"]),
    default="hessian",
    help="hessian: second derivative of the loss. ggn: its Gauss-Newton part, which has no "
    "negative eigenvalue if the criterion is convex. fisher: the Fisher matrix, from one target "
    "drawn for each prediction of the model.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    help="How to compute products. retained: keep graphs in memory. recompute: build them again "
    "for each product. auto: keep what fits. forward: for models that support forward mode. "
    "difference: needs first derivatives only; accurate to 1e-4, useless for ReLU networks.",
)
@click.option(
    "--mode",
    type=click.Choice(["eval", "train"]),
    default="eval",
    help="Mode of the model. eval: no dropout, running statistics. train: as in training.",
)
@click.option(
    "--params",
    metavar="REGEX",
    help="Only parameters whose name contains a match, such as ^head; without it, all trainable "
    "parameters.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Faster products with fewer digits; without it, in the dtype of the model.",
)
@click.option(
    "--microbatch",
    type=click.IntRange(1),
    help="Samples per pass, to save memory; without it, a whole batch.",
)
@click.option(
    "--weight-decay", type=float, default=0.0, help="Multiple of the identity to add to the matrix."
)
@click.option("--top", type=click.IntRange(0), default=5, help="Number of largest eigenvalues.")
@click.option("--bottom", type=click.IntRange(0), default=2, help="Number of smallest eigenvalues.")
@click.option(
    "--max-products",
    type=click.IntRange(1),
    default=300,
    help="Matrix-vector products for the eigenvalues at most. With the trace, both ends share one "
    "run, and the trace takes what the eigenvalues leave, at least 16. Without it, each end has "
    "its own.",
)
@click.option("--trace/--no-trace", default=True, help="Estimate the sum of all eigenvalues.")
@click.option(
    "--trace-rtol",
    type=float,
    default=0.05,
    help="Half-width of the trace's 95% interval, relative to the trace.",
)
@click.option(
    "--density/--no-density", default=True, help="Estimate the distribution of the eigenvalues."
)
@click.option("--steps", type=click.IntRange(1), default=60, help="Lanczos steps of the density.")
@click.option("--probes", type=click.IntRange(1), default=1, help="Random vectors of the density.")
@click.option(
    "--basis",
    type=click.Choice(FORMATS),
    default="full",
    help="Storage of the Lanczos vectors. compressed: half the memory of float32, accurate to 2e-4 "
    "of the largest eigenvalue. offload: vectors of a GPU in host memory.",
)
@click.option(
    "--sharded/--no-sharded",
    default=None,
    help="Of several ranks, each keeps a part of every Lanczos vector. Without it: if the model is "
    "so large that it pays.",
)
@click.option(
    "--check",
    is_flag=True,
    help="First check the products on this model: symmetry, repetition, central differences, "
    "weights.",
)
@click.option(
    "--blocks",
    metavar="BY",
    help="Also the top eigenvalue and the trace of each block. layer or stage: one block per layer "
    "or stage; a regular expression: its match in the name of a parameter is the block.",
)
@click.option(
    "--landscape/--no-landscape", default=True, help="Compute the loss along the top eigenvectors."
)
@click.option(
    "--points",
    type=click.IntRange(2),
    default=15,
    help="Grid points of the landscape per direction.",
)
@click.option(
    "--span",
    type=float,
    help="The landscape reaches from -span to +span; without it, the curvature sets the span.",
)
@click.option(
    "--checkpoint",
    metavar="DIR",
    help="New folder in which spectrum and landscape are saved every minute or so. After a kill, "
    "or SIGTERM, SIGUSR1 or SIGUSR2, which save and stop, go on with --resume.",
)
@click.option(
    "--resume",
    metavar="DIR",
    help="Go on with what --checkpoint saved; all other options as in the first call. The training "
    "is repeated, which gives the same model.",
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Save in time and stop with exit code 0, the training included; with --checkpoint or "
    "--resume.",
)
@click.option("--out", metavar="DIR", default="report", help="Report folder, new or empty.")
@click.option("--overwrite", is_flag=True, help="Replace a report that the folder already has.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print result.json; write a report only with --out."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; without it, torch's default.")
@click.pass_context
def analyze(ctx: click.Context, /, **options: Any) -> None:
    """Read the options, run the analysis, show and write the result."""
    from fasthessian.app.carry_out import carry_out

    named = ctx.get_parameter_source("out") is not ParameterSource.DEFAULT
    carry_out(options, named)


@cli.command()
@click.argument("result", metavar="RESULT.JSON")
@click.option("--out", metavar="DIR", default="figures", help="Folder for the figures.")
@click.option("--overwrite", is_flag=True, help="Replace figures that the folder already has.")
@once
def plot(result: str, out: str, overwrite: bool) -> None:
    r"""Draw the figures of a RESULT.JSON again.

    \b
    Example:
      fasthessian plot report/result.json --out figures
    """
    from fasthessian.app.report.figures import figures
    from fasthessian.app.report.folder import check_folder, write
    from fasthessian.app.report.result import read

    check_folder(out, overwrite=overwrite)
    drawn = figures(read(result))
    if not drawn:
        raise InputError(f"{result} has nothing to draw")
    write(out, drawn, overwrite=overwrite)
    for name in drawn:
        click.echo(Path(out) / name)


@cli.command("doctor")
@once
def doctor_command() -> None:
    r"""Show which kernels serve on this machine, and what several ranks would find.

    For each kernel that does not serve, it says why.

    \b
    Example:
      fasthessian doctor
    """
    from fasthessian.diagnosis import doctor

    click.echo(doctor())


plan_command.callback = once(plan_command.callback)
cli.add_command(plan_command)
cli.add_command(study_command)
