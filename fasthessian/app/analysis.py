"""The main job: spectrum, loss landscape and blocks of one problem, in that order."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.spectrum import spectrum
from fasthessian.algorithms.trace import trace
from fasthessian.app.advice import as_options
from fasthessian.app.division import Distribution, distribution, divided
from fasthessian.app.matrix import operator
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.app.saving import Saving
from fasthessian.distributed.ranks import Group, ranks_of
from fasthessian.errors import ConvergenceWarning, InputError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.checks import Check
from fasthessian.operators.curvature import Curvature
from fasthessian.results.records import BlockSpectra, Density, Eigenpairs, Estimate, Landscape
from fasthessian.study.sgd import OnStep

BLOCK_SAMPLES = 64  # products for the trace of a block
NOWHERE = Saving()
LEAST_SAMPLES = 16  # products of the trace that `spectrum` always keeps free

T = TypeVar("T")


class Stage(Protocol):
    """Opens a stage by its title and returns the callback for its steps."""

    def __call__(self, title: str, at_most: int | None = None) -> OnStep:
        """``at_most`` bounds the steps of a stage whose total is not known beforehand."""


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The numbers of one run; a part that was not asked for is None."""

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
    notes: Annotated[tuple[str, ...], "notes"]  # warnings of the algorithms, one line each
    seconds: dict[str, float]  # wall time of each stage
    check: Check | None = None
    blocks: BlockSpectra | None = None
    kernels: str = ""  # name of the backend that serves the operator's device
    failed: tuple[str, ...] = ()  # stages after the spectrum that failed, and why
    distribution: Distribution | None = None  # None for one process


class Spectra(NamedTuple):
    """The parts of the spectrum."""

    top: Eigenpairs | None = None
    bottom: Eigenpairs | None = None
    trace: Estimate | None = None
    density: Density | None = None


class Timed:
    """Runs stages one after the other and keeps the wall time of each."""

    def __init__(self, stage: Stage):
        """Open each stage with ``stage``."""
        self.stage = stage
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def run(
        self, key: str, title: str, job: Callable[[OnStep], T], at_most: int | None = None
    ) -> T:
        """The result of a job, which takes the callback for its steps."""
        start = time.perf_counter()
        result = job(self.stage(title, at_most))
        self.seconds[key] = time.perf_counter() - start
        return result

    def attempt(self, key: str, title: str, job: Callable[[OnStep], T]) -> T | None:
        """As ``run``, but an error is kept in ``failed``: the numbers found before are not lost."""
        try:
            return self.run(key, title, job)
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self.failed.append(f"{title} failed: {as_options(words)}")
            return None


def analyze(
    problem: Problem,
    options: AnalysisOptions,
    stage: Stage,
    group: Group = None,
    saving: Saving = NOWHERE,
) -> Analysis:
    """Compute what ``options`` ask for, of the curvature matrix of ``problem`` that they name.

    With ``group``, the ranks divide the data and return the same numbers. ``saving`` saves all
    except self-checks and blocks, and goes on with what was saved before.

    The landscape runs along the first two eigenvectors, or along one if only one was asked for. If
    the landscape or the blocks fail, the result holds the rest and ``failed`` says why.

    Raises:
        ValueError: the operator or an algorithm cannot work with the options, model or batch.
    """
    ranks = ranks_of(group)
    if options.sharded and not ranks:
        raise InputError(
            "--sharded needs several ranks; start with torchrun --nproc-per-node 2 -m fasthessian"
        )
    timed = Timed(stage)
    start = time.perf_counter()
    division = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ranks:
            problem, division = divided(problem, options, ranks)
        A = operator(problem, options, group)
        for option, k in (("--top", options.top), ("--bottom", options.bottom)):
            if k > A.n:
                raise InputError(f"{option} {k} is more than the {A.n} parameters of the model")
        blocks = {} if options.blocks is None else A.blocks(options.blocks)
        loss = A.loss()
        gradient_norm = float(A.gradient().norm())
        timed.seconds["operator"] = time.perf_counter() - start
        check = (
            timed.run("check", "self-checks", lambda _: self_check(A)) if options.check else None
        )
        saving.make(ranks)
        found = spectra(A, options, timed, saving)
        surface = None
        if options.landscape and found.top is not None:
            top = found.top
            span = (
                default_span(loss, float(top.values[0])) if options.span is None else options.span
            )
            surface = timed.attempt(
                "landscape",
                "loss landscape",
                lambda step: saving.run(
                    "landscape", landscape, A, top.vectors[:2], span, options.points, progress=step
                ),
            )
        parts = None
        if blocks:
            title = f"{len(blocks)} blocks"
            parts = timed.attempt(
                "blocks", title, lambda step: block_spectra(blocks, options.seed, step)
            )
    notes = [as_options(" ".join(str(w.message).split())) for w in caught] + timed.failed
    for rank, others in enumerate(ranks.objects(notes)):
        notes += [f"rank {rank}: {note}" for note in others if note not in notes]
    return Analysis(
        parameters=A.n,
        tensors=len(A.layout.names),
        engine=A.engine,
        loss=loss,
        gradient_norm=gradient_norm,
        **found._asdict(),
        landscape=surface,
        matvecs=A.matvecs,
        notes=tuple(dict.fromkeys(notes)),
        seconds=timed.seconds,
        check=check,
        blocks=parts,
        kernels=kernels.select(A.device).NAME,
        failed=tuple(timed.failed),
        distribution=distribution(A, options, group, division) if ranks else None,
    )


def self_check(A: Curvature) -> Check:
    """The self-checks of A, with their advice in options of the command line."""
    check = A.check()
    return dataclasses.replace(check, report=as_options(check.report))


def spectra(
    A: Curvature, options: AnalysisOptions, timed: Timed, saving: Saving = NOWHERE
) -> Spectra:
    """Eigenvalues, trace and density, as far as the options ask for them.

    If they ask for eigenvalues and the trace, one run of `spectrum` finds both, and the density of
    the same run. Otherwise each end of the spectrum, the trace and the density come from a function
    of their own. The eigenvalues of a run take ``options.max_products`` at most. In the one run the
    first probe of the density is part of these, even if it takes more, and the trace takes what
    they leave, at least 16.
    """
    keywords: dict[str, Any] = {
        "seed": options.seed,
        "basis": options.basis,
        "sharded": options.sharded,
    }
    steps = min(options.steps, A.n)
    if options.trace and options.top + options.bottom:
        if not options.density:
            steps = 1  # the cheapest density, which is dropped
        probes = options.probes if options.density else 1
        pairs = min(options.top + options.bottom, A.n)
        limit = max(
            options.max_products, max(steps, pairs) + pairs * (options.basis == "compressed")
        )
        limit += steps * (probes - 1) + LEAST_SAMPLES
        one = timed.run(
            "spectrum",
            "spectrum",
            lambda step: saving.run(
                "spectrum",
                spectrum,
                A,
                k=(options.top, options.bottom),
                steps=steps,
                probes=probes,
                rtol=options.trace_rtol,
                max_matvecs=limit,
                progress=step,
                **keywords,
            ),
            limit,
        )
        return Spectra(
            one.top if options.top else None,
            one.bottom if options.bottom else None,
            one.trace,
            one.density if options.density else None,
        )

    def end(key: str, k: int, which: str) -> Eigenpairs | None:
        if k == 0:
            return None
        most = options.max_products
        found: Eigenpairs = timed.run(
            key,
            f"{key} {k} eigenvalues",
            lambda step: saving.run(
                key, eigsh, A, k=k, which=which, max_matvecs=most, progress=step, **keywords
            ),
            most,
        )
        return found

    top, bottom = end("top", options.top, "LA"), end("bottom", options.bottom, "SA")
    total = shape = None
    if options.trace:
        total = timed.run(
            "trace",
            "trace",
            lambda step: saving.run(
                "trace", trace, A, rtol=options.trace_rtol, seed=options.seed, progress=step
            ),
        )
    if options.density:
        shape = timed.run(
            "density",
            "spectral density",
            lambda step: saving.run(
                "density", density, A, steps=steps, probes=options.probes, progress=step, **keywords
            ),
        )
    return Spectra(top, bottom, total, shape)


def block_spectra(blocks: Mapping[str, SymmetricOperator], seed: int, step: OnStep) -> BlockSpectra:
    """The outermost eigenvalue and the trace of each block, computed for all blocks together.

    Each trace takes BLOCK_SAMPLES products at most, and its interval is as wide as these make it.
    """
    with warnings.catch_warnings():  # residuals and intervals are shown
        warnings.simplefilter("ignore", ConvergenceWarning)
        tops = eigsh(blocks, 1, seed=seed, progress=step)
        made = sum(pairs.matvecs for pairs in tops.values())
        traces = trace(
            blocks,
            max_matvecs=BLOCK_SAMPLES,
            seed=seed,
            progress=lambda done, total: step(made + done, None),
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


def _column(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64, device="cpu")


def default_span(loss: float, curvature: float) -> float:
    """The distance at which a step of that curvature multiplies the loss by 11, to two digits.

    The distance comes from the quadratic model, so it follows the scale of the loss and of the
    parameters. It is 1 if the loss or the curvature is not positive and gives no scale.
    """
    if loss <= 0 or curvature <= 0:
        return 1.0
    return float(f"{math.sqrt(2 * 10 * loss / curvature):.2g}")
