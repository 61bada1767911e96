"""The entry point of ``fasthessian``: bad input ends in one line and exit code 2."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fasthessian.errors import Refusal


def main(args: Sequence[str] | None = None) -> None:
    """Run the command in ``args`` (default: ``sys.argv``) and leave with its exit code.

    0: done. 1: an extra package is missing, or a part of the work or its report failed. 2: bad
    input. 130: interrupted. All except 0 come with one line ``error: ...`` on stderr. Errors that
    nobody foresaw keep their traceback.
    """
    try:
        import click

        import fasthessian.app.progress  # noqa: F401  (brings rich)
    except ImportError as error:
        package = (error.name or "click and rich").partition(".")[0]
        fail(1, f"the command line needs {package}; pip install 'fasthessian[cli]'")
    from fasthessian.app.commands import cli

    try:
        code = cli.main(args, prog_name="fasthessian", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        fail(error.exit_code, error.format_message())
    except click.Abort:  # click raises it for Ctrl-C
        fail(130, "interrupted; nothing was written")
    except OSError as error:
        name = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(2, name)
    except Refusal as error:
        from fasthessian.app.advice import as_options

        fail(2, as_options(str(error)))
    except Exception as error:  # each rank may have its own, so each is shown once
        if "RANK" not in os.environ:
            raise
        from fasthessian.distributed.launch import leave

        leave(1, traceback.print_exc, f"{type(error).__name__}: {error}")
    sys.exit(code if isinstance(code, int) else 0)


def fail(code: int, message: str) -> NoReturn:
    """Print the message as one line and leave; of several ranks, rank 0 prints alone."""
    line = f"error: {' '.join(message.split())}"
    if "RANK" not in os.environ:
        print(line, file=sys.stderr)
        sys.exit(code)
    from fasthessian.distributed.launch import leave

    leave(code, lambda: print(line, file=sys.stderr))
