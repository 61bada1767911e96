"""PyHessian 0.1: its Hessian product, its density, and a count of its products."""

import contextlib
import copy
import warnings
from unittest import mock

import torch

from bench.peers.vectors import split


@contextlib.contextmanager
def package():
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


def product(model, criterion, batch):
    """Double backward on the gradient's graph, which its constructor keeps (in ``.grad``)."""
    with package() as pyhessian:
        held = pyhessian.hessian(copy.deepcopy(model), criterion, data=batch, cuda=False)
        from pyhessian.utils import hessian_vector_product
    return lambda v: hessian_vector_product(held.gradsH, held.params, split(v, held.params))


def density(model, criterion, data):
    """Its density as a function of the number of steps that returns the outermost nodes."""
    with package():
        pass  # ImportError where it is not installed

    def call(steps):
        with package() as pyhessian:
            held = pyhessian.hessian(model, criterion, data=data, cuda=data[0].is_cuda)
            nodes, _ = held.density(iter=steps)
        return float(min(nodes[0])), float(max(nodes[0]))

    return call


def counted():
    """Scope in which its products are counted: the mock's ``call_count``."""
    module = __import__("pyhessian.hessian", fromlist=["hessian"])
    original = module.hessian_vector_product
    return mock.patch.object(module, "hessian_vector_product", side_effect=original)
