"""fasthessian: Hessian spectra of PyTorch models at hardware speed."""

from fasthessian.__about__ import __version__
from fasthessian.algorithms.density import density
from fasthessian.algorithms.directions import filter_normalized, toward, trajectory
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.resume import resume
from fasthessian.algorithms.spectrum import spectrum
from fasthessian.algorithms.trace import trace
from fasthessian.diagnosis import doctor
from fasthessian.errors import ConvergenceWarning, InputError, InputTypeError, Stopped
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.fisher import EmpiricalFisher, Fisher
from fasthessian.operators.gaussnewton import GaussNewton
from fasthessian.operators.hessian import Hessian
from fasthessian.pyhessian import hessian
from fasthessian.results.records import (
    Density,
    Eigenpairs,
    Estimate,
    Landscape,
    Spectrum,
    Trajectory,
)

__all__ = [
    "ConvergenceWarning",
    "Density",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "InputError",
    "InputTypeError",
    "Landscape",
    "Spectrum",
    "Stopped",
    "SymmetricOperator",
    "Trajectory",
    "__version__",
    "density",
    "doctor",
    "eigsh",
    "filter_normalized",
    "hessian",
    "landscape",
    "resume",
    "spectrum",
    "toward",
    "trace",
    "trajectory",
]
