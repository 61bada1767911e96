"""The curvature matrix that the options of ``analyze`` name."""

from __future__ import annotations

import re
from typing import Any

from fasthessian.app.options import MATRICES, AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.distributed.ranks import Group
from fasthessian.errors import InputError
from fasthessian.operators.curvature import Curvature


def operator(problem: Problem, options: AnalysisOptions, group: Group = None) -> Curvature:
    """The matrix that the options name; with ``group``, ``problem`` has the data of this rank."""
    keywords: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("engine", "mode", "precision", "microbatch", "weight_decay")
    }
    keywords["group"] = group
    if options.matrix == "fisher":
        keywords["seed"] = options.seed
    if options.params is not None:
        keywords["params"] = named(problem, options.params)
    return MATRICES[options.matrix].make(problem.model, problem.criterion, problem.data, **keywords)


def named(problem: Problem, pattern: str) -> list[str]:
    """The names of the trainable parameters that hold a match of a regular expression."""
    known = dict(problem.model.named_parameters())
    try:
        chosen = [k for k, p in known.items() if p.requires_grad and re.search(pattern, k)]
    except re.error as error:
        raise InputError(f"--params {pattern!r} is not a regular expression: {error}") from error
    if not chosen:
        raise InputError(
            f"--params {pattern!r} matches no trainable parameter of the model; its names are "
            f"{', '.join(list(known)[:4])}{', ...' if len(known) > 4 else ''}"
        )
    return chosen
