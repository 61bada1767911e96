"""Translates the advice in messages of the library, which name Python arguments, to options."""

from __future__ import annotations

import re

REWRITES = (  # pattern and replacement, applied in this order
    (r"fh\.resume\('(.*?)/\w+', A(?:, time_limit=\.\.\.)?\)", r"--resume \1"),
    (r"\btime_limit=", "--time-limit "),
    (r",? or basis='none' needs [\d.]+ \w+", ", or leave the density out (--no-density)"),
    (r"with sigma=\S+ take basis='full', or a sigma of at least \S+", "take basis='full'"),
    (r"fewer steps or pairs, or a smaller ncv", "fewer --steps, --top or --bottom"),
    (r"\bmax_matvecs or (ncv|steps|tol)\b", "--max-products"),
    (r"\bmax_matvecs or rtol\b", "--trace-rtol"),
    (r"\bmax_matvecs\b", "--max-products"),
    (r"\ba smaller learning rate\b", "a smaller --lr"),
    (r"\b(use|with) Hessian\b(?!\.)", r"\1 --matrix hessian"),
    (r"pass weights=lambda batch: <[^>]*>, or all data", "return all data"),
    (r",? or weights=lambda batch: <[^>]*>", ""),
    (r"\b(microbatch|precision) must be None\b", r"--\1 must be left out"),
    (r"\b(without|and) microbatch\b", r"\1 --microbatch"),
    (r"\b(microbatch|precision|params)=None\b", r"no --\1"),
    (r"\b(engine|mode|basis|precision)='(\w+)'", r"--\1 \2"),
    (r"(--engine \w+) or '(\w+)'", r"\1 or \2"),
    (r"\bmicrobatch=(\d+)", r"--microbatch \1"),
    (r"\bweight_decay\b", "--weight-decay"),
    (r"^(engine|mode|basis|precision|params|microbatch) (?=must be|is|holds)", r"--\1 "),
)


def as_options(message: str) -> str:
    """The message with options of ``fasthessian analyze`` in place of Python arguments.

    Example:
        >>> as_options("use engine='difference', or microbatch=2")
        'use --engine difference, or --microbatch 2'
    """
    for pattern, option in REWRITES:
        message = re.sub(pattern, option, message)
    return message
