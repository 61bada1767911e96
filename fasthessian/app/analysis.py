"""The main job: eigenpairs, trace, density and landscape of one problem, in that order."""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.trace import trace
from fasthessian.app.advice import as_options
from fasthessian.app.problems import Problem
from fasthessian.errors import ConvergenceWarning, InputError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.checks import Check
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.fisher import Fisher
from fasthessian.operators.gaussnewton import GaussNewton
from fasthessian.operators.hessian import Hessian
from fasthessian.results.records import BlockSpectra, Density, Eigenpairs, Estimate, Landscape
from fasthessian.study.training import Progress

MATRICES: dict[str, Callable[..., Curvature]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": Fisher,
}
BLOCK_SAMPLES = 64  # products for the trace of a block


class Stage(Protocol):
    """Opens a stage by its title and returns what the stage reports its steps to."""

    def __call__(self, title: str, at_most: int | None = None) -> Progress:
        """``at_most`` bounds the steps of a stage that cannot tell them beforehand."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute; a part that is left out costs nothing."""

    top: int = 5
    bottom: int = 2
    max_products: int = 300  # for each end of the spectrum
    trace: bool = True
    trace_rtol: float = 0.05
    density: bool = True
    steps: int = 60
    probes: int = 1
    basis: str = "full"  # see `fasthessian.krylov.basis`
    landscape: bool = True
    points: int = 15
    span: float | None = None  # None: see `default_span`
    seed: int = 0
    check: bool = False  # the operator's self-checks
    blocks: str | None = None  # "layer", "stage" or a regular expression; see ``Hessian.blocks``
    matrix: str = "hessian"  # a key of `MATRICES`; the rest as ``Hessian`` takes it
    engine: str = "auto"
    mode: str = "eval"
    params: str | None = None  # a regular expression searched in the names; None: all parameters
    precision: str | None = None
    microbatch: int | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for a plan that cannot be carried out, before any work."""
        if not (self.top or self.bottom or self.trace or self.density):
            raise InputError("nothing to compute; ask for --top, --bottom, --trace or --density")
        if not 0 < self.trace_rtol < 1:
            raise InputError(f"--trace-rtol {self.trace_rtol} is not between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--weight-decay {self.weight_decay} is not a number of at least 0")
        if self.span is not None and not 0 < self.span < math.inf:
            raise InputError(f"--span {self.span} is not a positive number")
        if self.max_products < max(self.top, self.bottom):
            raise InputError(
                f"--max-products {self.max_products} is less than the eigenvalues asked for"
            )
        if self.landscape and not self.top:
            raise InputError(
                "the landscape follows the top eigenvectors; give --top 1 or more, or "
                "--no-landscape"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What came out; None where the plan left the part out."""

    parameters: int
    tensors: int
    engine: str
    loss: float
    gradient_norm: float
    top: Eigenpairs | None
    bottom: Eigenpairs | None
    trace: Estimate | None
    density: Density | None
    landscape: Landscape | None
    matvecs: int
    notes: tuple[str, ...]  # warnings of the algorithms, one line each
    seconds: dict[str, float]  # wall time by stage
    check: Check | None = None
    blocks: BlockSpectra | None = None


def analyze(problem: Problem, plan: Plan, stage: Stage) -> Analysis:
    """Carry out ``plan`` on the curvature matrix of ``problem`` that it names.

    The landscape runs along the first two eigenvectors, along one where only one was asked for.

    Raises:
        ValueError: a plan, model or batch that the operator or an algorithm cannot work with.
    """
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}

    def run(
        key: str, title: str, job: Callable[[Progress], Any], at_most: int | None = None
    ) -> None:
        start = time.perf_counter()
        found[key] = job(stage(title, at_most))
        seconds[key] = time.perf_counter() - start

    def ends(key: str, k: int, which: str) -> None:
        run(
            key,
            f"{key} {k} eigenvalues",
            lambda p: eigsh(
                A,
                k,
                which,
                max_matvecs=plan.max_products,
                seed=plan.seed,
                basis=plan.basis,
                progress=p,
            ),
            plan.max_products,
        )

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        A = operator(problem, plan)
        for option, k in (("--top", plan.top), ("--bottom", plan.bottom)):
            if k > A.n:
                raise InputError(f"{option} {k} is more than the {A.n} parameters of the model")
        blocks = {} if plan.blocks is None else A.blocks(plan.blocks)
        loss = A.loss()
        gradient_norm = float(A.gradient().norm())
        seconds["operator"] = time.perf_counter() - start
        if plan.check:
            run("check", "self-checks", lambda p: _told(A.check()))
        if plan.top:
            ends("top", plan.top, "LA")
        if plan.bottom:
            ends("bottom", plan.bottom, "SA")
        if plan.trace:
            run(
                "trace",
                "trace",
                lambda p: trace(
                    A,
                    rtol=plan.trace_rtol,
                    deflate=found.get("top"),
                    seed=plan.seed,
                    progress=p,
                ),
            )
        if plan.density:
            run(
                "density",
                "spectral density",
                lambda p: density(
                    A,
                    steps=min(plan.steps, A.n),
                    probes=plan.probes,
                    seed=plan.seed,
                    basis=plan.basis,
                    progress=p,
                ),
            )
        if plan.landscape:
            top = found["top"]
            span = default_span(loss, float(top.values[0])) if plan.span is None else plan.span
            run(
                "landscape",
                "loss landscape",
                lambda p: landscape(A, top.vectors[:2], span, plan.points, progress=p),
            )
        if blocks:
            run("blocks", f"{len(blocks)} blocks", block_spectra(blocks, plan.seed))
    return Analysis(
        parameters=A.n,
        tensors=len(A.layout.names),
        engine=A.engine,
        loss=loss,
        gradient_norm=gradient_norm,
        top=found.get("top"),
        bottom=found.get("bottom"),
        trace=found.get("trace"),
        density=found.get("density"),
        landscape=found.get("landscape"),
        check=found.get("check"),
        blocks=found.get("blocks"),
        matvecs=A.matvecs,
        notes=tuple(dict.fromkeys(as_options(" ".join(str(w.message).split())) for w in caught)),
        seconds=seconds,
    )


def operator(problem: Problem, plan: Plan) -> Curvature:
    """The matrix that the plan names, as it is to be made."""
    options: dict[str, Any] = {
        name: getattr(plan, name)
        for name in ("engine", "mode", "precision", "microbatch", "weight_decay")
    }
    if plan.matrix == "fisher":
        options["seed"] = plan.seed
    if plan.params is not None:
        named = dict(problem.model.named_parameters())
        try:
            chosen = [k for k, p in named.items() if p.requires_grad and re.search(plan.params, k)]
        except re.error as error:
            raise InputError(
                f"--params {plan.params!r} is not a regular expression: {error}"
            ) from error
        if not chosen:
            raise InputError(
                f"--params {plan.params!r} matches no trainable parameter of the model; its names "
                f"are {', '.join(list(named)[:4])}{', ...' if len(named) > 4 else ''}"
            )
        options["params"] = chosen
    return MATRICES[plan.matrix](problem.model, problem.criterion, problem.data, **options)


def _told(check: Check) -> Check:
    return dataclasses.replace(check, report=as_options(check.report))


def block_spectra(
    blocks: Mapping[str, SymmetricOperator], seed: int
) -> Callable[[Progress], BlockSpectra]:
    """A job: the outermost eigenvalue and the trace of each block, all blocks together.

    Traces get as many products as BLOCK_SAMPLES, and the interval that those reach.
    """

    def job(progress: Progress) -> BlockSpectra:
        with warnings.catch_warnings():  # residuals and intervals are shown
            warnings.simplefilter("ignore", ConvergenceWarning)
            tops = eigsh(blocks, 1, seed=seed, progress=progress)
            made = sum(pairs.matvecs for pairs in tops.values())
            traces = trace(
                blocks,
                max_matvecs=BLOCK_SAMPLES,
                seed=seed,
                progress=lambda done, total: progress(made + done, None),
            )
        pairs, estimates = tops.values(), traces.values()
        halves = [(e.interval[1] - e.interval[0]) / 2 for e in estimates]
        return BlockSpectra(
            names=tuple(blocks),
            sizes=_column(float(block.n) for block in blocks.values()),
            values=_column(float(p.values[0]) for p in pairs),
            residuals=_column(float(p.residuals[0]) for p in pairs),
            traces=_column(e.value for e in estimates),
            errors=_column(halves),
        )

    return job


def _column(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64, device="cpu")


def default_span(loss: float, curvature: float) -> float:
    """How far a step of that curvature multiplies the loss by 11, to two digits.

    A distance by the quadratic model, so it follows the scale of the loss and of the parameters;
    1 where a loss or curvature that is not positive gives no scale.
    """
    if loss <= 0 or curvature <= 0:
        return 1.0
    return float(f"{math.sqrt(2 * 10 * loss / curvature):.2g}")
