"""Drop-in for PyHessian: the same names, argument order and return types.

``from fasthessian.pyhessian import hessian`` replaces ``from pyhessian import hessian``. Scripts
that cannot be edited call `install` first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings

from fasthessian.pyhessian import utils
from fasthessian.pyhessian.density_plot import density_generate, get_esd_plot
from fasthessian.pyhessian.hessian import hessian
from fasthessian.pyhessian.utils import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

# the names that a star import of PyHessian gives, modules included, and two that its forks add
__all__ = [
    "argparse",
    "density_generate",
    "get_esd_plot",
    "get_params_grad",
    "group_add",
    "group_product",
    "hessian",
    "hessian_vector_product",
    "importlib",
    "normalization",
    "orthnormal",
    "os",
    "utils",
]

_OURS = {
    "pyhessian": "fasthessian.pyhessian",
    "pyhessian.hessian": "fasthessian.pyhessian.hessian",
    "pyhessian.utils": "fasthessian.pyhessian.utils",
    "pyhessian.density_plot": "fasthessian.pyhessian.density_plot",
    "density_plot": "fasthessian.pyhessian.density_plot",
}


def install() -> None:
    """Make ``import pyhessian`` and ``import density_plot`` find this package in this process.

    Call it before the first of those imports. If modules of these names were imported before, they
    are replaced with one warning, and names already imported from them do not change.

    Example:
        >>> install()
        >>> import pyhessian
        >>> pyhessian.hessian.__module__
        'fasthessian.pyhessian.hessian'
    """
    ours = {alias: importlib.import_module(name) for alias, name in _OURS.items()}
    found = [a for a, module in ours.items() if sys.modules.get(a, module) is not module]
    if found:
        warnings.warn(
            f"{', '.join(found)} had been imported before install(): replaced from here on, but "
            "names already imported from there stay; call install() first",
            UserWarning,
            stacklevel=2,
        )
    sys.modules.update(ours)
