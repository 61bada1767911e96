r"""Gauss quadrature from a Krylov run, and what its m nodes do not tell about the measure.

The spectral measure of the start vector has the Jacobi matrix of the run. Its Gauss rule of m nodes
is exact for polynomials of degree up to 2 m - 1 (Golub, Welsch 1969). Two measures with the same
moments up to that degree have distribution functions F that differ at x by at most the Christoffel
function (Chebyshev, Markov, Stieltjes; Szego, Orthogonal polynomials, 3.41)::

    |F(x) - F_Gauss(x)| <= c(x) = 1 / sum_j p_j(x)^2,    p_0 .. p_(m-1) orthonormal

c is about density times node spacing in a bulk and the weight at a node. It is 0 in the gaps around
a converged node, and everywhere once the Krylov space has ended.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fasthessian.checkpoints.state import State
from fasthessian.checkpoints.states import States
from fasthessian.krylov.lockstep import Asking
from fasthessian.operators.request import Request

POLL_EVERY = 16  # steps between two polls of a GPU's run
REACH = 8  # kernel widths; the mass of a Gaussian outside of it is below 1e-15
TOGETHER = 16  # nodes whose terms on a grid are made at a time
SAMPLES = 8  # of the Christoffel function between two nodes


class KrylovRun(Protocol):
    """A Krylov space that grows by one product per step, and its Jacobi matrix.

    It has a basis (``Lanczos``) or none (``ThreeTerm``).
    """

    capacity: int  # steps at most

    @property
    def size(self) -> int:
        """Steps made."""

    @property
    def ended(self) -> bool:
        """Whether the space of the start vector ended, so that ``jacobi`` is all of it."""

    @property
    def resolution(self) -> float:
        """Eigenvalues closer than this may share a node; 0 where no precision was lost."""

    @property
    def graph(self) -> str:
        """Whether steps are replayed as a CUDA graph, or why not."""

    def advance(self) -> Asking:
        """Ask for one product and make one more step, unless the space has ended."""

    def poll(self, wait: bool) -> bool:
        """Refresh what is known of the steps made; False if nothing new is known."""

    def jacobi(self) -> Tensor:
        """The Jacobi matrix (j, j) of the start vector, float64 on the CPU, as of the last poll."""

    def close(self) -> None:
        """Free the rows."""


@dataclasses.dataclass
class Measured(State):
    """What quadrature takes from a run that has ended; see ``KrylovRun``."""

    jacobi: Tensor
    resolution: float = 0.0
    graph: str = ""
    ended: bool = False
    made: int = 0  # products of the algorithm up to then

    @classmethod
    def none(cls) -> Measured:
        """Of no run, to be restored from a checkpoint."""
        return cls(torch.empty(0, 0, dtype=torch.float64, device="cpu"))


def grow(
    krylov: KrylovRun, states: States, steps: int, callback: Callable[[], None]
) -> Generator[Request, None, Measured]:
    """Make ``steps`` steps, or fewer if the space of the start vector ends before."""
    while krylov.size < min(steps, krylov.capacity) and not krylov.ended:
        yield from krylov.advance()
        last = krylov.size >= min(steps, krylov.capacity) or krylov.ended
        if last or krylov.size % POLL_EVERY == 0:
            krylov.poll(wait=last)
        callback()
    return Measured(krylov.jacobi(), krylov.resolution, krylov.graph, krylov.ended, states.made)


class Rule(NamedTuple):
    """A Gauss rule, from the eigenvectors S of a Jacobi matrix (m, m); all (m,) float64."""

    nodes: Tensor  # ascending
    weights: Tensor  # S[0]^2, sum 1
    first: Tensor  # S[0]
    last: Tensor  # S[-1]
    exact: bool  # the measure has no other points


def quadrature(T: Tensor, exact: bool) -> Rule:
    """The Gauss rule of the measure that T (m, m) belongs to."""
    nodes, S = torch.linalg.eigh(T)
    weights = S[0] ** 2
    return Rule(nodes, weights / weights.sum(), S[0], S[-1], exact)


def christoffel(rule: Rule, x: Tensor) -> Tensor:
    """The bound c at the points x (g,); 0 for an exact rule.

    For p(x) = (p_0 .. p_(m-1)) the vector (T - x) p is a multiple of the last unit vector. So p is
    a multiple of ``sum_k S_k last_k / (node_k - x)``, scaled to p_0 = 1.
    """
    if rule.exact:
        return torch.zeros_like(x)
    start, norm2 = torch.zeros_like(x), torch.zeros_like(x)
    tiny = 1e-14 * max(float(rule.nodes.abs().max()), 1e-300)
    columns = (torch.split(each, TOGETHER) for each in (rule.nodes, rule.first, rule.last))
    for nodes, first, last in zip(*columns, strict=True):
        away = nodes[:, None] - x
        pole = last[:, None] / torch.where(away.abs() < tiny, tiny, away)
        start += (first[:, None] * pole).sum(0)
        norm2 += (pole**2).sum(0)
    return start**2 / norm2.clamp(min=1e-300)


def width(rule: Rule) -> float:
    """The integral of c over the range of the nodes: their mean spacing, weighted by the density.

    It bounds the Wasserstein distance of the measure from its Gauss rule within that range.
    """
    between = (torch.arange(SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / SAMPLES
    gaps = rule.nodes.diff()
    x = rule.nodes[:-1, None] + gaps[:, None] * between
    return float((christoffel(rule, x.reshape(-1)).reshape(x.shape).mean(1) * gaps).sum())


def unresolved(rule: Rule, grid: Tensor, sigma: float) -> Tensor:
    r"""How far a density smoothed by a Gaussian of width sigma may be from the Gauss rule's (g,).

    Integration by parts bounds ``|int g(x - t) d(F - F_Gauss)(t)|`` by ``int c(t) |g'(x - t)| dt``
    for any measure. Where the density is smooth over a node spacing d, the nodes act as a
    trapezoidal rule, whose error is smaller by about ``exp(-2 pi^2 (sigma / d)^2)``, and c is
    multiplied by that factor. It is near 1, and the bound rigorous, for kernels finer than d / 10.
    """
    if rule.exact:
        return torch.zeros_like(grid)
    gaps = rule.nodes.diff()
    spacing = torch.nn.functional.pad(gaps, (1, 1), value=math.inf)[
        torch.searchsorted(rule.nodes, grid)
    ]
    unknown = christoffel(rule, grid) * torch.exp(-2 * (math.pi * sigma / spacing) ** 2)
    step = float(grid[1] - grid[0])
    reach = math.ceil(REACH * sigma / step)
    t = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu") * (step / sigma)
    slope = t.abs() * torch.exp(-0.5 * t**2) / (sigma**2 * math.sqrt(2 * math.pi)) * step
    return torch.nn.functional.conv1d(unknown[None, None], slope[None, None], padding=reach)[0, 0]
