"""Directions in parameter space for `landscape`: filter-normalised, towards a model, of a path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian import kernels
from fasthessian.arguments import integer, seed_of
from fasthessian.distributed.fsdp import is_distributed
from fasthessian.errors import InputError, InputTypeError
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator, finite
from fasthessian.operators.matrix import Matrix, with_loss
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.results.records import Trajectory
from fasthessian.vectors import empty_rows, real

ROWS = 8  # vectors that are held while the inner products of a trajectory are computed
ZERO = 1e-13  # relative to the sum of squares: what rounding leaves of an eigenvalue of zero


@restored
def filter_normalized(
    A: SymmetricOperator, directions: int | Tensor = 2, *, seed: int = 0
) -> Tensor:
    r"""Random directions with the scale of the weights, filter by filter.

    ``d[f] <- d[f] / ||d[f]|| * ||theta[f]||`` for every filter f: a slice along the first dimension
    of a parameter with two or more dimensions, which is a filter of a convolution or a row of a
    linear layer or an embedding. Other parameters (biases, scales of normalisation layers) do not
    move, as in the authors' code. Landscapes of networks whose weights have different scales can
    then be compared: the usual span is 1.

    Li, Xu, Taylor, Studer, Goldstein 2018, Visualizing the loss landscape of neural nets, section 4
    (arXiv 1712.09913).

    Args:
        A: an operator that knows its loss: ``fh.Hessian``.
        directions: how many directions are drawn from N(0, 1), or given directions (n,) or (k, n)
            of the operator's dtype, which are normalised instead.
        seed: of the random directions, which do not depend on the number of ranks.

    Returns:
        Tensor: (k, n), of the operator's dtype.

    Raises:
        TypeError: A has no loss; ``directions`` is neither an integer nor a tensor of A's dtype.
        ValueError: ``directions`` is below 1 or has another shape; no parameter has filters.

    Example:
        >>> import torch, fasthessian as fh
        >>> W = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
        >>> A = fh.Hessian.from_closure(lambda: W.square().sum(), {"W": W})
        >>> V = fh.filter_normalized(A)
        >>> V.view(2, 2, 2).norm(dim=2).round(decimals=4)  # of each direction and row
        tensor([[5., 1.],
                [5., 1.]])
        >>> surface = fh.landscape(A, V, points=5)
    """
    matrix = with_loss(A)
    layout = matrix.layout
    if max(layout.dims) < 2:
        raise InputError(
            "A must have a parameter of two or more dimensions, whose filters give the scale, got "
            f"only {len(layout.dims)} of fewer; pass directions of your own to fh.landscape"
        )
    if isinstance(directions, Tensor):
        A._check_vector("directions", directions, (1, 2))
        V = directions.detach().reshape(-1, A.n).clone()
    else:
        seed, count = seed_of(seed), integer("directions", directions, 1)
        V = torch.empty(count, A.n, dtype=A.dtype, device=A.device)
        for i, v in enumerate(V):
            kernels.select(A.device).normal_(v, seed, i * A.n)
    weights = layout.views(matrix.theta())
    for v in V:
        for piece, weight, dim in zip(layout.views(v), weights, layout.dims, strict=True):
            if dim < 2:
                piece.zero_()
                continue
            size, wanted = (_norms(t) for t in (piece, weight))
            factor = torch.where(size > 0, wanted / size, 0.0)
            piece.mul_(factor.to(piece.dtype).view(-1, *[1] * (piece.dim() - 1)))
    return V


def _norms(t: Tensor) -> Tensor:
    """The norm of each slice along the first dimension, float64."""
    norms: Tensor = torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64)
    return norms


@restored
def toward(A: SymmetricOperator, other: Mapping[str, Tensor] | Tensor | nn.Module) -> Tensor:
    """The direction ``theta_other - theta`` from the parameters of A to those of another model.

    Along it, `landscape` interpolates between the two models: alpha = 0 is the model of A,
    alpha = 1 the other one (Goodfellow, Vinyals, Saxe 2015, arXiv 1412.6544).

    Only parameters are interpolated. Buffers stay those of the model of A at every point. With
    batch normalisation in eval mode, the running statistics therefore fit only alpha = 0, and the
    loss at alpha = 1 is not that of the other model. ``fh.Hessian(..., mode="train")`` uses the
    statistics of each batch, which fit every point.

    Args:
        A: an operator that knows its loss: ``fh.Hessian``.
        other: a state dict, which may have further entries; a vector (n,) in the order of
            ``A.layout``; or a module, whose state dict is used. Dtype and device are converted.

    Returns:
        Tensor: (n,), of the operator's dtype.

    Raises:
        TypeError: A has no loss, or ``other`` is something else.
        ValueError: ``other`` lacks a parameter, has one of another shape, or holds NaN or Inf.

    Example:
        >>> import torch, fasthessian as fh
        >>> x = torch.zeros(2, requires_grad=True)
        >>> A = fh.Hessian.from_closure(lambda: (x - 1).square().sum(), {"x": x})
        >>> d = fh.toward(A, {"x": torch.ones(2)})
        >>> fh.landscape(A, d, span=(-0.5, 1.5), points=5).losses
        tensor([4.5000, 2.0000, 0.5000, 0.0000, 0.5000], dtype=torch.float64)
    """
    matrix = with_loss(A)
    return _difference(matrix, other, "other", matrix.theta())


@restored
def trajectory(
    A: SymmetricOperator, points: Iterable[Mapping[str, Tensor] | Tensor | nn.Module]
) -> Trajectory:
    """The plane through the parameters of A that shows most of a path of training.

    Principal component analysis of the points theta_i: the two directions of largest variance, and
    the coordinates of each ``theta_i - theta`` along them. ``fh.landscape(A, trajectory)`` then
    computes the loss on the part of the plane that holds the whole path, and its plot shows the
    path on the contours. A is usually an operator at the end of the path.

    Li et al. 2018, section 7 (arXiv 1712.09913). Few dimensions always hold most of the variance of
    a path in a space of many dimensions, also of a random walk.

    The points are read one at a time, each 1 + ceil(t / 8) times. At most 12 vectors of length n
    are in memory, besides what ``points`` holds.

    Args:
        A: an operator that knows its loss: ``fh.Hessian``.
        points: at least three checkpoints in the order of training, each as in `toward`: a list, or
            an object that reads them anew each time that it is iterated over.

    Returns:
        Trajectory: directions (2, n), coordinates (t, 2) and ratios (2,) of the variance.

    Raises:
        TypeError: A has no loss, or a point is something else, or ``points`` is an iterator.
        ValueError: there are fewer than three points, all lie on one line, one lacks a parameter,
            or has one of another shape, or holds NaN or Inf.

    Example:
        >>> import torch, fasthessian as fh
        >>> x = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
        >>> A = fh.Hessian.from_closure(lambda: x.square().sum(), {"x": x})
        >>> path = fh.trajectory(A, torch.tensor([[4.0, 0, 1], [2, 1, 1], [0, 0, 1]]))
        >>> path.coordinates[:2].round(decimals=4)
        tensor([[4., 0.],
                [2., 1.]], dtype=torch.float64)
        >>> path.ratios.round(decimals=4)
        tensor([0.9231, 0.0769], dtype=torch.float64)
        >>> surface = fh.landscape(A, path, points=11)
    """
    matrix = with_loss(A)
    if isinstance(points, Iterator) or not isinstance(points, Iterable):
        raise InputTypeError(
            "points must be a list, or an object that can be iterated over several times, got "
            f"{type(points).__name__}; use points=list(...)"
        )
    theta = matrix.theta()

    def differences(start: int) -> Iterator[Tensor]:
        for i, point in itertools.islice(enumerate(points), start, None):
            yield _difference(matrix, point, f"points[{i}]", theta)

    G = _inner_products(matrix, differences)
    t = len(G)
    if t < 3:
        raise InputError(
            f"points must be three or more, got {t}; for one or two use fh.toward(A, point)"
        )
    centred = G - G.mean(0)
    centred -= centred.mean(1, keepdim=True)
    values, U = torch.linalg.eigh(centred)  # ascending
    values, U = values[-2:].flip(0), U[:, -2:].flip(1)
    rounding = torch.finfo(A.dtype).eps * (theta.norm() + G.diagonal().max().sqrt())
    if float(values[1]) <= t * max(ZERO * float(G.trace()), float(rounding) ** 2):
        raise InputError(
            f"points must span a plane, but the {t} given lie on one line, to rounding; use "
            "fh.toward(A, point)"
        )
    C = (U - U.mean(0)) / values.sqrt()  # (t, 2): the directions are C' (theta_i - theta)
    coordinates = G @ C
    signs = torch.where(coordinates[0] < 0, -1.0, 1.0).double()  # the path begins at alpha >= 0
    V = torch.zeros(2, A.n, dtype=A.dtype, device=A.device)
    for d, factors in zip(differences(0), (C * signs).tolist(), strict=True):
        for v, factor in zip(V, factors, strict=True):
            v.add_(d, alpha=factor)
    V[0] /= _norms(V[:1])
    dots = Space(A).dots
    dots(V[:1], V[1:], dots(V[:1], V[1:])[0])  # makes V[1] orthogonal to V[0]
    V[1] /= _norms(V[1:])
    return Trajectory(
        directions=V, coordinates=coordinates * signs, ratios=values / centred.trace()
    )


def _inner_products(matrix: Matrix, differences: Callable[[int], Iterator[Tensor]]) -> Tensor:
    """The inner products (t, t) of all differences, ROWS rows per pass; float64 on the CPU."""
    dots = Space(matrix).dots  # type: ignore[arg-type]  # its size, dtype and device alone
    V = empty_rows(ROWS, matrix.n, matrix.dtype, matrix.device)
    G = torch.empty(0, 0, dtype=torch.float64, device="cpu")
    start = 0
    while start == 0 or start < len(G):
        columns: list[Tensor] = []
        for d in differences(start):
            if len(columns) < ROWS:
                V[len(columns)] = d
            columns.append(dots(V[: len(columns) + 1], d[None])[0][:, 0].cpu())
        if start == 0:
            G = torch.zeros(len(columns), len(columns), dtype=torch.float64, device="cpu")
        for i, column in enumerate(columns, start):
            G[start : start + len(column), i] = column
        start += ROWS
    return G.triu() + G.triu(1).T


def _difference(matrix: Matrix, point: Any, name: str, theta: Tensor) -> Tensor:
    """The parameters of a point minus theta (n,)."""
    layout = matrix.layout
    point = point.state_dict() if isinstance(point, nn.Module) else point
    if isinstance(point, Tensor):
        if point.shape != (layout.n,):
            raise InputError(f"{name} must have shape ({layout.n},), got {tuple(point.shape)}")
        d = torch.empty_like(theta).copy_(point.detach())
    elif isinstance(point, Mapping):
        d = torch.empty_like(theta)
        for key, view in layout.unflatten(d).items():
            found: Any = point.get(key)
            if not isinstance(found, Tensor):
                raise InputError(
                    f"{name} must hold a tensor for each parameter of A, got none for {key!r} "
                    f"among {', '.join(map(repr, itertools.islice(point, 4)))}"
                )
            found = found.detach()
            found = real(found.full_tensor() if is_distributed(found) else found)
            if found.shape != view.shape:
                raise InputError(
                    f"{name} must have shape {tuple(view.shape)} for {key!r}, "
                    f"got {tuple(found.shape)}"
                )
            view.copy_(found)
    else:
        raise InputTypeError(
            f"{name} must be a state dict, a vector ({layout.n},) or a module, "
            f"got {type(point).__name__}"
        )
    if not finite(d.sub_(theta)):
        raise InputError(f"{name} holds NaN or Inf, as after a training that diverged")
    return d
