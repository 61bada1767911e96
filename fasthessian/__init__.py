"""fasthessian: Hessian spectra of PyTorch models at hardware speed."""

from fasthessian.__about__ import __version__ as __version__
