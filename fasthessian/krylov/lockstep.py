"""Algorithms as generators that ask for products, so that many can advance in one pass.

A run yields `Request`s, finds the products in their ``out`` when it goes on, and returns its
record. ``solve`` answers the requests of one run by its operator, and those of the runs over a
dictionary of operators together: one pass over the data a round for the blocks of one matrix.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from fasthessian.arguments import ProgressCallback
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.base import SymmetricOperator, multiply, operator
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.results.record import Record

R = TypeVar("R", bound=Record)
Asking = Generator[Request, None, None]
Run = Generator[Request, None, tuple[R, list[Warning]]]  # the record, and where it falls short
Start = Callable[[SymmetricOperator, "ProgressCallback | None"], Run[R]]


class Guard:
    """Notices changes, during a run, of what the operators depend on.

    Products before and after such a change belong to two matrices. Changes between runs are fine.
    """

    def __init__(self, operators: Iterable[SymmetricOperator]) -> None:
        matrices = {id(A._matrix): A._matrix for A in operators}
        self._matrices = list(matrices.values())
        self._kept = {id(A._kept): A._kept for A in self._matrices}.values()
        self._runs = contextlib.ExitStack()

    def __enter__(self) -> Guard:
        for A in self._matrices:
            A._agree()
        self._counts = [kept.changes(poll=True)[0] for kept in self._kept]
        for kept in self._kept:
            self._runs.enter_context(kept.run())
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Poll once more: at the end, and after an error that a change may have caused."""
        self._runs.close()
        if kind is None or issubclass(kind, (ValueError, RuntimeError)):
            self.check(poll=True)

    def check(self, poll: bool = False) -> None:
        """Raise RuntimeError if a product found a change, or if a ``poll`` finds one."""
        for kept, count in zip(self._kept, self._counts, strict=True):
            now, name = kept.changes(poll)
            if now != count:
                owner = name.partition(".")[0].partition("[")[0]
                owner = owner if owner in ("criterion", "data") else "model"
                raise UnsupportedError(
                    f"{name} changed during the run, whose products then belong to two matrices; "
                    f"change it before or after the run, or analyse a copy: copy.deepcopy({owner})"
                )


@contextlib.contextmanager
def leaving(operators: Iterable[SymmetricOperator]) -> Iterator[None]:
    """If the run fails on this rank, end it on the others, too."""
    try:
        yield
    except BaseException as error:
        for ranks in {A._matrix._ranks for A in operators}:
            ranks.leave(error)
        raise


def answer(requests: Asking) -> None:
    """Answer every request, one by one."""
    for request in requests:
        multiply([request])


@restored
def solve(A: Any, start: Start[R], progress: ProgressCallback | None) -> R | dict[str, R]:
    """The record of a run for an operator, or a record per name for a dictionary of operators."""
    if not isinstance(A, Mapping):
        with leaving([operator(A)]), Guard([operator(A)]) as guard:
            run = start(A, progress)
            while True:
                try:
                    request = next(run)
                except StopIteration as stop:
                    record, shortfalls = stop.value
                    break
                multiply([request])
                guard.check()
                del request  # the run may free its rows before the next request
        for shortfall in shortfalls:
            warnings.warn(shortfall, stacklevel=4)
        return record  # type: ignore[no-any-return]
    return _together(A, start, progress)


def _together(
    operators: Mapping[str, SymmetricOperator], start: Start[R], progress: ProgressCallback | None
) -> dict[str, R]:
    """Advance all runs in rounds: one request of each, in one pass if they share a matrix."""
    if not operators:
        raise InputError("A is an empty dictionary; pass an operator, or blocks such as A.blocks()")
    if len({id(A) for A in operators.values()}) < len(operators):
        raise InputError("A holds one operator under two names; name each once")
    done: dict[str, tuple[int, int | None]] = {}

    def callback_for(name: str) -> ProgressCallback | None:
        if progress is None:
            return None

        def callback(made: int, total: int | None) -> None:
            done[name] = made, total
            totals = [t for _, t in done.values()]
            whole = None if None in totals or len(done) < len(operators) else sum(totals)  # type: ignore[arg-type]
            progress(sum(made for made, _ in done.values()), whole)

        return callback

    found: dict[str, R] = {}
    checked = [operator(A) for A in operators.values()]
    with leaving(checked), Guard(checked) as guard:
        runs = {name: start(A, callback_for(name)) for name, A in operators.items()}
        while runs:
            requests = []
            for name in list(runs):
                try:
                    requests.append(next(runs[name]))
                except StopIteration as stop:
                    del runs[name]
                    found[name], shortfalls = stop.value
                    for shortfall in shortfalls:
                        warnings.warn(type(shortfall)(f"{name}: {shortfall}"), stacklevel=5)
                    continue
                except (ValueError, MemoryError) as error:
                    raise type(error)(f"{name}: {error}") from error
            multiply(requests)
            guard.check()
    return {name: found[name] for name in operators}
