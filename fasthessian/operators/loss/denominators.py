"""What a loss divides its sum over terms by, read from the graph of its computation."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

BRANCHES = 64  # summands of a loss that are followed
MEAN, SUM = 1, 2  # torch's numbers for reduction="mean" and "sum"
# They change the shape or the sign of a scalar, or add a constant to it.
PASSED = {
    "NegBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0",
    "ToCopyBackward0", "CloneBackward0", "AliasBackward0", "AddBackward0", "AddBackward1",
    "SubBackward0", "SubBackward1", "RsubBackward0", "RsubBackward1",
}  # fmt: skip
SUMS = {"SumBackward0", "SumBackward1", "NansumBackward0", "DotBackward0"}


def denominators(loss: Tensor) -> list[float]:
    """The numbers by which the summands of a scalar loss divide their sums over terms.

    One number for each summand, in a fixed order: the entries of a mean, the total weight of a
    cross-entropy, the divisor of a sum, 1 for a sum alone; times the constants on the way. Empty
    where an operation on the way is not known to be linear.
    """
    found: list[float] = []
    todo: list[tuple[Any, float]] = [(loss.grad_fn, 1.0)]
    while todo:
        node, scale = todo.pop()
        number, factor = _ended(node), _factor(node)
        if number is not None:
            found.append(number * scale)
        elif factor is not None:
            todo += [(child, scale * factor) for child in _children(node)]
        else:
            return []
        if len(found) + len(todo) > BRANCHES:
            return []
    return found if all(map(math.isfinite, found)) else []


def _children(node: Any) -> list[Any]:
    return [child for child, _ in reversed(node.next_functions) if child is not None]


def _ended(node: Any) -> float | None:
    """The denominator of a reduction; None for another operation."""
    if node is None:
        return None
    name = node.name()
    if name in ("MeanBackward0", "MeanBackward1"):
        sizes = node._saved_self_sym_sizes
        # -1 is saved as an unsigned number
        dims = [d - (d >> 63 << 64) for d in getattr(node, "_saved_dim", None) or ()]
        return float(math.prod(sizes[d] for d in dims) if dims else math.prod(sizes))
    if name in SUMS:
        # a mean over one dimension, summed over the others, divides by the length of the one
        inner = _children(node)
        mean = len(inner) == 1 and inner[0].name() == "MeanBackward1"
        return _ended(inner[0]) if mean else 1.0
    reduction = getattr(node, "_saved_reduction", None)
    if reduction == SUM:
        return 1.0
    if reduction == MEAN:
        weight = getattr(node, "_saved_total_weight", None)
        return float(node._saved_self.numel()) if weight is None else float(weight)
    return None


def _factor(node: Any) -> float | None:
    """By what an operation on a scalar multiplies the denominator; None if it is not linear."""
    if node is None:
        return None
    name = node.name()
    if name in PASSED:
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
    return 1 / value if value else 0.0  # times 0: it has no term
