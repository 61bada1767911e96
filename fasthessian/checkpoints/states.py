"""The states of one run by name: what is saved of it, and what an interrupted run left of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from fasthessian.checkpoints.state import State, Stored

S = TypeVar("S", bound=State)
Yielded = TypeVar("Yielded")


class Counted(Protocol):
    """What counts the products of a run: its operator."""

    matvecs: int


class Part(NamedTuple):
    """A state as it was saved."""

    numbers: Mapping[str, Any]
    stored: Mapping[str, Stored]


class States:
    """All that changes in a run: states by name, and how many products it has made.

    If the run continues an interrupted one, each state takes over what was saved under its name
    when it is added. The code of an algorithm is therefore the same for both.

    Args:
        counter: the operator.
        saved: what an interrupted run left, by name.
        made: products that it had made.
    """

    def __init__(
        self, counter: Counted, saved: Mapping[str, Part] | None = None, made: int = 0
    ) -> None:
        self._counter, self._saved = counter, dict(saved or {})
        self._states: dict[str, State] = {}
        self._results: dict[str, Any] = {}  # of phases, also among the states
        self.before = counter.matvecs - made  # the count at which the run would have begun
        self.ended_phase = False  # since the last save

    @property
    def made(self) -> int:
        """Products of the run, those before an interruption included."""
        return self._counter.matvecs - self.before

    def add(self, name: str, state: S) -> S:
        """Save this state with the run from now on; first it takes over what was saved of it."""
        if name in self._saved:
            part = self._saved.pop(name)
            state.restore(part.numbers, part.stored)
        self._states[name] = state
        return state

    def remove(self, name: str) -> None:
        """Save this state no longer: the phase that it belongs to has ended."""
        del self._states[name]
        self.ended_phase = True

    def phase(
        self, name: str, result: S, run: Callable[[], Generator[Yielded, None, S]]
    ) -> Generator[Yielded, None, S]:
        """The result of a phase: as it is known or was saved, else what ``run`` returns.

        It is saved from then on.

        Args:
            name: of the result among the states.
            result: takes over what was saved.
            run: the phase. It is not called if an interrupted run has ended it.
        """
        if name not in self._results:
            self._results[name] = result if name in self._saved else (yield from run())
            self.add(name, self._results[name])
        return self._results[name]  # type: ignore[no-any-return]

    def items(self) -> Iterator[tuple[str, State]]:
        """The states that are saved, by name."""
        yield from self._states.items()
