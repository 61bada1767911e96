"""The errors that the package raises on purpose, its warning, and the exit of a stopped run.

Each is also the built-in exception that Python users expect: ``except ValueError`` catches an
`InputError`. Their common base, `Refusal`, tells them from bugs, for example on the command line.
"""

from __future__ import annotations


class Refusal(Exception):
    """A foreseen error. Its message says what cannot be done, and what to do instead."""


class InputError(Refusal, ValueError):
    """An argument, a file, or a result of the caller's code has a value that is not accepted."""


class InputTypeError(Refusal, TypeError):
    """An argument, or a result of the caller's code, has a type that is not accepted."""


class UnsupportedError(Refusal, RuntimeError):
    """The model, its data or this machine cannot do what was asked."""


class InsufficientMemoryError(Refusal, MemoryError):
    """There is not enough free memory for what was asked."""


class MissingPackageError(Refusal, ImportError):
    """An optional package is needed but not installed."""


class ConvergenceWarning(UserWarning):
    """A result did not reach the requested accuracy; the record says what it reached."""


class Stopped(SystemExit):
    """A run with a checkpoint left early: its time is up, or a signal asked for it.

    The state is saved, and the message says how to go on. A process that does not catch it ends
    with exit code 0.
    """

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message
