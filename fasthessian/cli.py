"""The entry point of ``fasthessian``: bad input ends in one line and exit code 2."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PACKAGE = str(Path(__file__).parent) + os.sep
RAISE = dis.opmap["RAISE_VARARGS"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command in ``args`` (default: ``sys.argv``) and leave with its exit code.

    0: done. 1: an extra package is missing, or the work is done and its report failed. 2: bad
    input. 130: interrupted. Each but 0 with one line ``error: ...`` on stderr; errors that are not
    about the input keep their traceback.
    """
    try:
        import click

        import fasthessian.console  # noqa: F401  (brings rich)
    except ImportError as error:
        package = (error.name or "click and rich").partition(".")[0]
        fail(1, f"the command line needs {package}; pip install 'fasthessian[cli]'")
    from fasthessian.commands import cli

    try:
        code = cli.main(args, prog_name="fasthessian", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        fail(error.exit_code, error.format_message())
    except click.Abort:  # what click makes of Ctrl-C
        fail(130, "interrupted; nothing was written")
    except OSError as error:
        name = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(2, name)
    except (ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        if not deliberate(error):
            raise
        from fasthessian.study.advice import as_options

        fail(2, as_options(str(error)))
    sys.exit(code if isinstance(code, int) else 0)


def deliberate(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package made the error, and not a bug or user code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_filename.startswith(PACKAGE) and code.co_code[trace.tb_lasti] == RAISE


def fail(code: int, message: str) -> NoReturn:
    """Say it in one line and leave."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
