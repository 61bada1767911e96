"""Goes on with an interrupted call of an algorithm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.spectrum import spectrum
from fasthessian.algorithms.trace import trace
from fasthessian.arguments import ProgressCallback
from fasthessian.checkpoints.call import Saved
from fasthessian.errors import InputError
from fasthessian.operators.base import SymmetricOperator, operator

ALGORITHMS = {
    "density": density,
    "eigsh": eigsh,
    "landscape": landscape,
    "spectrum": spectrum,
    "trace": trace,
}


def resume(
    path: str | os.PathLike[str],
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    *,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Any:
    """Go on with a call that was made with ``checkpoint=path`` and did not end.

    A call with ``checkpoint`` saves its state every 60 seconds, or less often where that would take
    more than 2 % of the time. It may be killed at any moment. If it gets SIGTERM, SIGUSR1 or
    SIGUSR2, or its ``time_limit`` comes near, it saves before the next product and raises
    ``fasthessian.Stopped``, with which a process ends with exit code 0. Signals are handled if the
    call is made in the main thread.

    The resumed call has the arguments of the interrupted one. It returns what that one would have
    returned: the same bits on the same number of ranks, its matvecs and its warnings included. It
    goes on saving to the same folder. The result of a call that has ended is returned at once.

    The operator must be the one that the checkpoint was made with: its class, options and
    parameters are compared, and one evaluation of its loss over all of the data, or one product if
    it has no loss. A call with ``checkpoint`` makes this evaluation once, too.

    Args:
        path: the folder.
        A: the operator, or the dictionary of operators, of the interrupted call.
        time_limit: seconds for this call.
        progress: callback, called as in the interrupted call, with the products of both.

    Returns:
        The record of the algorithm that was called, or a dictionary of records.

    Warns:
        UserWarning: the newest state is damaged; the one before it is used.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no state that is whole, or A differs from the operator that it was made
            with, or ``time_limit`` is too short for one product.
        Stopped: see above.

    Example:
        >>> import os, tempfile, torch, fasthessian as fh
        >>> path = os.path.join(tempfile.mkdtemp(), "run.fh")
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> found = fh.trace(A, checkpoint=path)
        >>> fh.resume(path, A).value
        5050.0
    """
    first = next(iter(A.values()), None) if isinstance(A, Mapping) else A
    found = operator(first)
    saved = Saved(path, found._matrix._ranks, found.device)
    if saved.single == isinstance(A, Mapping):
        kind = "an operator" if saved.single else "a dictionary of operators"
        raise InputError(f"A must be {kind}, as in the call that {path} was made by")
    if saved.arguments.get("sharded") and not found._matrix._ranks:
        saved.arguments["sharded"] = None  # one rank goes on with what several began
    algorithm: Any = ALGORITHMS[saved.algorithm]
    return algorithm(
        A, **saved.arguments, checkpoint=saved, time_limit=time_limit, progress=progress
    )
