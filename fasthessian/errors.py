"""The errors that the package raises on purpose, and its warning.

Each is also the built-in exception that Python users expect, so ``except ValueError`` catches an
`InputError`. The common base lets a caller, such as the command line, tell them from bugs.
"""

from __future__ import annotations


class Refusal(Exception):
    """An error that was foreseen: its message says what cannot be done and what would help."""


class InputError(Refusal, ValueError):
    """An argument, a file or a result of the caller's code has a value that is not accepted."""


class InputTypeError(Refusal, TypeError):
    """As `InputError`, for a type that is not accepted."""


class UnsupportedError(Refusal, RuntimeError):
    """The model, its data or this machine cannot do what was asked."""


class InsufficientMemoryError(Refusal, MemoryError):
    """What was asked does not fit into the memory that is free."""


class MissingPackageError(Refusal, ImportError):
    """An optional package is needed and not installed."""


class ConvergenceWarning(UserWarning):
    """A result did not reach the accuracy that was asked for; the record says how far it got."""
