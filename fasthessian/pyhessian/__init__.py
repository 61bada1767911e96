"""Drop-in for PyHessian: the same names, argument order and return types.

``from fasthessian.pyhessian import hessian`` replaces ``from pyhessian import hessian``. Scripts
that cannot be edited call `install` first.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from fasthessian.pyhessian.hessian import hessian
from fasthessian.pyhessian.utils import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

__all__ = [
    "get_params_grad",
    "group_add",
    "group_product",
    "hessian",
    "hessian_vector_product",
    "install",
    "normalization",
    "orthnormal",
]

_OURS = {
    "pyhessian": "fasthessian.pyhessian",
    "pyhessian.hessian": "fasthessian.pyhessian.hessian",
    "pyhessian.utils": "fasthessian.pyhessian.utils",
    "density_plot": "fasthessian.pyhessian.density_plot",
}


def install() -> None:
    """Make ``import pyhessian`` and ``import density_plot`` find this package in this process.

    Call it before the first of those imports. Modules of these names that were imported before
    are replaced, with one warning; names already taken from them stay what they were.

    Example:
        >>> install()
        >>> import pyhessian
        >>> pyhessian.hessian.__module__
        'fasthessian.pyhessian.hessian'
    """
    ours = {alias: import_module(name) for alias, name in _OURS.items()}
    found = [a for a, module in ours.items() if sys.modules.get(a, module) is not module]
    if found:
        warnings.warn(
            f"{', '.join(found)} had been imported before install(): replaced from here on, but "
            "names already imported from there stay; call install() first",
            UserWarning,
            stacklevel=2,
        )
    sys.modules.update(ours)
