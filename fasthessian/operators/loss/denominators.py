"""The divisor of a loss's sum over terms, read in the graph of its computation.

For example the graph of ``(x.square() * mask).sum() / mask.sum()`` ends in a division, whose node
has saved the value of ``mask.sum()``; and the node of ``mean()`` has saved the shape of its input.
``denominators`` walks from the loss through operations on scalars down to such a reduction.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

SUMMANDS = 64  # of a loss with more nothing is read
MEAN, SUM = 1, 2  # torch's codes for reduction="mean" and "sum"
# Operations that change the shape or the sign of a scalar, or add to it.
UNSCALED = {
    "NegBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0",
    "ToCopyBackward0", "CloneBackward0", "AliasBackward0", "AddBackward0", "AddBackward1",
    "SubBackward0", "SubBackward1", "RsubBackward0", "RsubBackward1",
}  # fmt: skip
SUMS = {"SumBackward0", "SumBackward1", "NansumBackward0", "DotBackward0"}


def denominators(loss: Tensor) -> list[float]:
    """The number that each summand of a scalar loss divides its sum over terms by.

    One number per summand, in a fixed order: the number of entries of a mean, the total weight of
    a cross-entropy, the divisor of a sum, 1 for a sum without one; divided by the constants that
    the summand is multiplied with. Empty if an operation in between is not known to be linear.
    """
    found: list[float] = []
    todo: list[tuple[Any, float]] = [(loss.grad_fn, 1.0)]
    while todo:
        node, scale = todo.pop()
        number, factor = _reduced_by(node), _factor(node)
        if number is not None:
            found.append(number * scale)
        elif factor is not None:
            todo += [(child, scale * factor) for child in _children(node)]
        else:
            return []
        if len(found) + len(todo) > SUMMANDS:
            return []
    return found if all(map(math.isfinite, found)) else []


def _children(node: Any) -> list[Any]:
    return [child for child, _ in reversed(node.next_functions) if child is not None]


def _reduced_by(node: Any) -> float | None:
    """The denominator of a reduction; None for any other operation."""
    if node is None:
        return None
    name = node.name()
    if name in ("MeanBackward0", "MeanBackward1"):
        sizes = node._saved_self_sym_sizes
        # -1 is saved as an unsigned number
        dims = [d - (d >> 63 << 64) for d in getattr(node, "_saved_dim", None) or ()]
        return float(math.prod(sizes[d] for d in dims) if dims else math.prod(sizes))
    if name in SUMS:
        # the sum of means over one dimension is divided by the length of that dimension
        inner = _children(node)
        mean = len(inner) == 1 and inner[0].name() == "MeanBackward1"
        return _reduced_by(inner[0]) if mean else 1.0
    reduction = getattr(node, "_saved_reduction", None)
    if reduction == SUM:
        return 1.0
    if reduction == MEAN:
        weight = getattr(node, "_saved_total_weight", None)
        return float(node._saved_self.numel()) if weight is None else float(weight)
    return None


def _factor(node: Any) -> float | None:
    """The factor that an operation on a scalar gives its denominator; None if it is not linear."""
    if node is None:
        return None
    name = node.name()
    if name in UNSCALED:
        return 1.0
    multiplied, divided = name.startswith("MulBackward"), name.startswith("DivBackward")
    nonzero = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
    if not (multiplied or divided) or len(nonzero) != 1 or (divided and nonzero != [0]):
        return None
    other = getattr(node, "_saved_other" if nonzero == [0] else "_saved_self", None)
    if other is None or (isinstance(other, Tensor) and other.numel() != 1):
        return None
    value = abs(float(other))
    if divided:
        return value
    return 1 / value if value else 0.0  # multiplied by 0: the summand has no term
