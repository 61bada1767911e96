"""PyHessian as installed from PyPI, with its removed torch.eig replaced."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def pyhessian():
    """The package ``pyhessian``; inside, torch.eig answers as it did before torch 2.0."""

    def eig(T, eigenvectors=False):
        values, vectors = torch.linalg.eigh(T)
        return torch.stack((values, torch.zeros_like(values)), dim=1), vectors

    held = torch.__dict__.get("eig")
    torch.eig = eig
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # double backward with create_graph warns of a cycle
            import pyhessian

            yield pyhessian
    finally:
        if held is None:
            del torch.eig
        else:
            torch.eig = held
