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
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.keeper import Keeper
from fasthessian.checkpoints.states import States
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.krylov.checkpointed import keeper
from fasthessian.operators.base import SymmetricOperator, multiply, operator
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.results.record import Record

R = TypeVar("R", bound=Record)
Asking = Generator[Request, None, None]
Run = Generator[Request, None, tuple[R, list[Warning]]]  # the record, and where it falls short
Start = Callable[[SymmetricOperator, "ProgressCallback | None", States], Run[R]]


class Guard:
    """Notices changes, during a run, of what the operators depend on.

    Products before and after such a change belong to two matrices. Changes between runs are fine.
    At the start the ranks of the operators agree on their data, and compare the call.
    """

    def __init__(self, operators: Iterable[SymmetricOperator], call: Call) -> None:
        self._call = call
        matrices = {id(A._matrix): A._matrix for A in operators}
        self._matrices = list(matrices.values())
        self._kept = {id(A._kept): A._kept for A in self._matrices}.values()
        self._runs = contextlib.ExitStack()

    def __enter__(self) -> Guard:
        for A in self._matrices:
            A._agree(self._call.words())
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
def solve(
    A: Any,
    start: Start[R],
    progress: ProgressCallback | None,
    call: Call,
    steps: Callable[[SymmetricOperator], int] = lambda A: 1,
) -> R | dict[str, R]:
    """The record of a run for an operator, or a record per name for a dictionary of operators.

    All runs advance in rounds: one request of each, in one pass over the data if they share a
    matrix. Before each round is the boundary at which ``call`` may be saved and stopped. ``steps``
    is how many steps the run of an operator reports as progress for each product.
    """
    single = not isinstance(A, Mapping)
    operators = {"": operator(A)} if single else _checked(A)
    with (
        leaving(operators.values()),
        Guard(operators.values(), call) as guard,
        keeper(call, operators) as kept,
    ):
        counts = {name: kept.runs[name].made * steps(B) for name, B in operators.items()}
        callback_for = _callbacks(progress, counts, kept) if not single else lambda name: progress
        runs = {
            name: start(B, callback_for(name), kept.runs[name])
            for name, B in operators.items()
            if name not in kept.ended
        }
        while runs:
            requests: list[Request] = []  # without the last ones: a run may free its rows
            for name in list(runs):
                try:
                    requests.append(next(runs[name]))
                except StopIteration as stop:
                    del runs[name]
                    kept.end(name, *stop.value)
                except (ValueError, MemoryError) as error:
                    if single:
                        raise
                    raise type(error)(f"{name}: {error}") from error
            if requests:
                kept.boundary(sum(len(request.V) for request in requests) or 1)
                multiply(requests)
            guard.check()
        kept.finish()
    found = {}
    for name, (record, shortfalls) in kept.ended.items():
        found[name] = record
        for shortfall in shortfalls:
            words = shortfall if single else type(shortfall)(f"{name}: {shortfall}")
            warnings.warn(words, stacklevel=4 + call.resumed)
    return found[""] if single else {name: found[name] for name in operators}


def _checked(operators: Mapping[str, SymmetricOperator]) -> dict[str, SymmetricOperator]:
    if not operators:
        raise InputError("A is an empty dictionary; pass an operator, or blocks such as A.blocks()")
    if len({id(A) for A in operators.values()}) < len(operators):
        raise InputError("A holds one operator under two names; name each once")
    return {name: operator(A) for name, A in operators.items()}


def _callbacks(
    progress: ProgressCallback | None, counts: dict[str, int], kept: Keeper
) -> Callable[[str], ProgressCallback | None]:
    """A callback for each of several runs, which reports their sum; ``counts`` are made before."""
    totals: dict[str, int | None] = {name: counts[name] for name in kept.ended}

    def callback_for(name: str) -> ProgressCallback | None:
        if progress is None:
            return None

        def callback(made: int, total: int | None) -> None:
            counts[name], totals[name] = made, total
            known = [t for t in totals.values() if t is not None]
            whole = sum(known) if len(known) == len(counts) else None
            progress(sum(counts.values()), whole)

        return callback

    return callback_for
