"""curvlinops: its Hessian product, eager and compiled, and its curvature of the loss."""

import warnings

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from bench.peers.vectors import split


def package():
    """The package ``curvlinops``; one of its dependencies warns when imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import curvlinops
    return curvlinops


def product(model, criterion, batch, block_sizes=None):
    """Forward over reverse: jvp of jacrev, vmapped over the vectors."""
    H = package().HessianLinearOperator(
        model, criterion, list(model.parameters()), [batch],
        check_deterministic=False, num_data=len(batch[0]), block_sizes=block_sizes,
    )  # fmt: skip
    return lambda v: H @ v


def compiled_product(model, criterion, batch):
    """The same product, traced and compiled here at its first call: it offers no such option.

    torch.compile of the product itself falls back to eager code: it does not get past the NumPy
    integers by which the package cuts its lists. A trace holds none.
    """
    params = list(model.parameters())
    H = package().HessianLinearOperator(
        model, criterion, params, [batch], check_deterministic=False, num_data=len(batch[0])
    )
    compiled = None

    def call(v):
        nonlocal compiled
        pieces = [piece.unsqueeze(-1) for piece in split(v, params)]
        if compiled is None:
            traced = make_fx(lambda *pieces: H._mp(*batch, *pieces))(*pieces)
            compiled = torch.compile(traced, fullgraph=True)
        with torch.no_grad():
            return compiled(*pieces)

    return call


def logit_curvature(Z, U, y):
    """Its Gauss-Newton product for a model that returns its parameter, so that J = 1."""
    call = package().ggn.make_ggn_vector_product(lambda z, x: z, F.cross_entropy)
    return lambda: call((Z,), None, y, U)[0]
