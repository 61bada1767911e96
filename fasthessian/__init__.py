"""fasthessian: Hessian spectra of PyTorch models at hardware speed."""

from fasthessian.__about__ import __version__
from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.resume import resume
from fasthessian.algorithms.spectrum import spectrum
from fasthessian.algorithms.trace import trace
from fasthessian.errors import ConvergenceWarning, InputError, InputTypeError, Stopped
from fasthessian.kernels import doctor
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.fisher import EmpiricalFisher, Fisher
from fasthessian.operators.gaussnewton import GaussNewton
from fasthessian.operators.hessian import Hessian
from fasthessian.pyhessian import hessian
from fasthessian.results.records import Density, Eigenpairs, Estimate, Landscape, Spectrum

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
    "__version__",
    "density",
    "doctor",
    "eigsh",
    "hessian",
    "landscape",
    "resume",
    "spectrum",
    "trace",
]
