"""The other libraries as installed from PyPI: what each needs to run, and its Hessian product.

A product is made by ``make(model, criterion, batch)`` and maps a vector (n,) to H v, which is flat
or a sequence of tensors, as the library has it.
"""

import contextlib
import copy
import warnings

import torch
from torch.fx.experimental.proxy_tensor import make_fx


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


def curvlinops():
    """The package ``curvlinops``; one of its dependencies warns when imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import curvlinops
    return curvlinops


def split(v, params):
    return [a.view_as(p) for a, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


def by_pyhessian(model, criterion, batch):
    """Double backward on the gradient's graph, which its constructor keeps (in ``.grad``)."""
    with pyhessian() as package:
        held = package.hessian(copy.deepcopy(model), criterion, data=batch, cuda=False)
        from pyhessian.utils import hessian_vector_product as product
    return lambda v: product(held.gradsH, held.params, split(v, held.params))


def by_eigenthings(model, criterion, batch):
    """Double backward, the graph built at each product."""
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    loss = supervised_loss(criterion)
    return HessianOperator(model, [batch], loss, full_dataset=False).matvec


def by_curvlinops(model, criterion, batch, block_sizes=None):
    """Forward over reverse: jvp of jacrev, vmapped over the vectors."""
    H = curvlinops().HessianLinearOperator(
        model, criterion, list(model.parameters()), [batch],
        check_deterministic=False, num_data=len(batch[0]), block_sizes=block_sizes,
    )  # fmt: skip
    return lambda v: H @ v


def by_curvlinops_compiled(model, criterion, batch):
    """The same product, traced and compiled by us at its first call: it offers no such option.

    torch.compile of the product itself falls back to eager code: it does not get past the NumPy
    integers by which the package cuts its lists. A trace holds none.
    """
    params = list(model.parameters())
    H = curvlinops().HessianLinearOperator(
        model, criterion, params, [batch], check_deterministic=False, num_data=len(batch[0])
    )
    compiled = None

    def product(v):
        nonlocal compiled
        pieces = [piece.unsqueeze(-1) for piece in split(v, params)]
        if compiled is None:
            traced = make_fx(lambda *pieces: H._mp(*batch, *pieces))(*pieces)
            compiled = torch.compile(traced, fullgraph=True)
        with torch.no_grad():
            return compiled(*pieces)

    return product
