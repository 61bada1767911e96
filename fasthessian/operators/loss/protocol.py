"""What products need of a loss, whether it belongs to a model or is a closure."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fasthessian.operators.loss.coupling import Coupling
from fasthessian.operators.loss.part import Part
from fasthessian.operators.torch_state.gathered import Gathered
from fasthessian.operators.torch_state.reachable import Entry
from fasthessian.operators.torch_state.scopes import Scope


class Loss(Protocol):
    """A loss as a weighted sum of parts; see ``ModelLoss`` and ``ClosureLoss``.

    Attributes:
        origin: what computes it, for messages: "criterion", "model" or "closure".
        freed_graph_advice: the message for a loss whose graph is gone.
        model: the model, or None for a closure, which also has no batches.
        roots: the modules whose modes and buffers are set for an evaluation.
        count, size, samples: parts, and numbers and samples in all of them.
        terms_here: the number of terms in the data of this rank.
        counted: whether the terms of all parts are counted.
        terms_vary: whether their number may depend on the parameters.
        fixed_order: whether every pass has the same parts in the same order.
        note: what was guessed, for ``engine``.
        gathered: the full parameters of a fully_shard model.
    """

    origin: str
    freed_graph_advice: str
    roots: list[nn.Module]
    count: int
    size: int
    samples: int
    terms_here: float
    counted: bool
    fixed_order: bool
    gathered: Gathered

    @property
    def model(self) -> nn.Module | None: ...  # noqa: D102

    @property
    def terms_vary(self) -> bool: ...  # noqa: D102

    @property
    def way_to_count(self) -> str:
        """How the terms are counted, if that was found out from the loss; else ""."""

    @property
    def note(self) -> str: ...  # noqa: D102

    def named_parameters(self) -> dict[str, Tensor]:
        """The parameters by name, as they are now."""

    def entries(self, whole: bool) -> Iterator[Entry]:
        """What the loss depends on; see ``ChangeDetector``."""

    def survey(self) -> None:
        """Look at the data anew, after they or the criterion changed."""

    def protected(self) -> Scope[None]:
        """Inside, which is a pass, the loss protects what its evaluations may write."""

    def count_terms(self, params: Sequence[Tensor], allowed: float) -> None:
        """Count the terms of each part by the loss itself."""

    def totals(self, ways: Sequence[str]) -> list[float]:
        """The numbers of terms in the data of this rank, by each way to count."""

    def set_share(self, terms: float, parts: int = 0, samples: int = 0) -> None:
        """Take over which share of the data of all ranks this rank has.

        The weights of the parts are their numbers of terms over ``terms``, that of all ranks. The
        numbers of ``parts`` and ``samples`` of the ranks before this one place random numbers.
        """

    def coupling(self, params: Sequence[Tensor], allowed: float) -> Coupling:
        """Whether batches are what their parts make up; see ``coupling``."""

    def parts(self) -> Generator[Part, None, None]:
        """One pass over the data."""

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """The model's outputs and the scalar loss of one part, with their graph."""
