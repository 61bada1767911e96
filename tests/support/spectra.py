"""Operators and matrices whose eigenvalues are chosen."""

import torch

import fasthessian as fh

F32, F64 = torch.float32, torch.float64


def diagonal(values, dtype=F64, scale=1.0):
    d = torch.as_tensor(values, dtype=F64).mul(scale).to(dtype)
    return fh.SymmetricOperator(lambda v: d * v, len(d), dtype=dtype)


def outliers(n=20000):
    """A bulk and twelve outliers, the shape of a network's spectrum."""
    bulk = torch.rand(n - 12, generator=torch.Generator().manual_seed(0), dtype=F64) * 0.5 - 0.05
    return torch.cat([bulk, torch.tensor([100.0, 60, 40, 30, 20, 12, 8, 5, 3, 2, 1.5, -3])])


class Dense(fh.SymmetricOperator):
    """A matrix that multiplies a block of vectors at once."""

    def __init__(self, M):
        super().__init__(M.mv, len(M), dtype=M.dtype, check=False)
        self.M = M

    def _multiply(self, requests):
        for request in requests:
            torch.mm(request.V, self.M, out=request.out)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rotated(values, block=None, seed=0):
    """These eigenvalues in a random basis, or in one whose vectors have ``block`` elements."""
    values = torch.as_tensor(values, dtype=F64)
    n = len(values)
    block = block or n
    sizes = [min(block, n - i) for i in range(0, n, block)]
    Q = torch.block_diag(*(torch.linalg.qr(normal(b, b, seed=seed + b))[0] for b in sizes))
    return (Q * values) @ Q.T


def joined(*parts):
    return torch.cat([torch.as_tensor(part, dtype=F64) for part in parts])
