"""What ``fasthessian analyze`` is asked to compute: its options as one record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from fasthessian.errors import InputError
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.fisher import Fisher
from fasthessian.operators.gaussnewton import GaussNewton
from fasthessian.operators.hessian import Hessian


class Matrix(NamedTuple):
    """A matrix that can be analysed."""

    make: Callable[..., Curvature]
    name: str
    products: str  # how its exact products are made


MATRICES = {
    "hessian": Matrix(Hessian, "Hessian", "by double backward"),
    "ggn": Matrix(
        GaussNewton, "Gauss-Newton matrix", "as J' M J with the Jacobian J of the outputs"
    ),
    "fisher": Matrix(
        Fisher, "Fisher matrix", "as J' M J, M from targets drawn from the model's predictions"
    ),
}


@dataclasses.dataclass(frozen=True)
class AnalysisOptions:
    """What to compute. A part that is left out costs nothing."""

    top: int = 5
    bottom: int = 2
    max_products: int = 300  # for the eigenvalues; see `fasthessian.app.analysis.spectra`
    trace: bool = True
    trace_rtol: float = 0.05
    density: bool = True
    steps: int = 60
    probes: int = 1
    basis: str = "full"  # see `fasthessian.krylov.basis`
    landscape: bool = True
    points: int = 15
    span: float | None = None  # None: see `fasthessian.app.analysis.default_span`
    seed: int = 0
    check: bool = False  # run the self-checks of the operator
    blocks: str | None = None  # "layer", "stage" or a regular expression; see ``Hessian.blocks``
    matrix: str = "hessian"  # a key of `MATRICES`; the options below are those of ``Hessian``
    engine: str = "auto"
    mode: str = "eval"
    params: str | None = None  # a regular expression searched in the names; None: all parameters
    precision: str | None = None
    microbatch: int | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for options that do not go together, before any work."""
        if not (self.top or self.bottom or self.trace or self.density):
            raise InputError("nothing to compute; ask for --top, --bottom, --trace or --density")
        if not 0 < self.trace_rtol < 1:
            raise InputError(f"--trace-rtol {self.trace_rtol} is not between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--weight-decay {self.weight_decay} is not a number of at least 0")
        if self.span is not None and not 0 < self.span < math.inf:
            raise InputError(f"--span {self.span} is not a positive number")
        if self.matrix not in MATRICES:
            raise InputError(f"--matrix {self.matrix} is not one of {', '.join(MATRICES)}")
        if self.max_products < max(self.top, self.bottom):
            raise InputError(
                f"--max-products {self.max_products} is less than the eigenvalues asked for"
            )
        if self.landscape and not self.top:
            raise InputError(
                "the landscape follows the top eigenvectors; give --top 1 or more, or "
                "--no-landscape"
            )
