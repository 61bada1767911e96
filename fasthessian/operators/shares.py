"""The share of the data that each rank has, and the sums over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasthessian.distributed.failures import known_to_all
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError
from fasthessian.operators.base import finite
from fasthessian.operators.evaluation import Evaluation
from fasthessian.operators.loss.halving import SAME
from fasthessian.operators.loss.terms import NO_TERMS
from fasthessian.operators.request import Batches, Request
from fasthessian.operators.torch_state.lock import exclusive


class Shares:
    """What the ranks of a matrix add up. Without a process group there is one share, the whole.

    A part of the data counts by its number of terms over the number of terms of all ranks. No
    collective is called under the lock of the process, for which ranks in threads would wait.

    Args:
        ranks: the ranks that the data are divided over.
        evaluation: of the loss over the data of this rank.
    """

    def __init__(self, ranks: Ranks, evaluation: Evaluation) -> None:
        self.ranks, self._evaluation = ranks, evaluation
        self._terms = 0.0  # of all ranks
        self._of_ranks: list[tuple[float, int]] = []

    def agree(self) -> None:
        """Count the terms of all ranks.

        The data of a rank may change between two runs, but not inside one: so this is called
        before each run, and before each product outside of a run.
        """
        if not self.ranks:
            return
        evaluation, loss = self._evaluation, self._evaluation.loss

        @exclusive
        def counted() -> list[float]:
            evaluation.within_memory(evaluation.count, "the number of terms")
            return [loss.terms_here, loss.count, loss.samples, evaluation.relative_error()]

        with loss.gathered.open():
            rows = self.ranks.exchanged(counted, 4)
        self._of_ranks = [(terms, int(parts)) for terms, parts, *_ in rows.tolist()]
        evaluation.error = float(rows[:, 3].max())  # algorithms decide by it: it must be the same
        total = float(rows[:, 0].sum())
        if total <= 0:
            raise known_to_all(InputError(f"{NO_TERMS}, or no rank has a batch"))
        if total != self._terms:
            evaluation.kept.forget()  # the weights of its graphs are out of date
            self._compare_ways()
        self._terms = total
        _, parts, samples, _ = rows[: self.ranks.rank].sum(0).tolist()
        loss.set_share(total, int(parts), int(samples))

    @property
    def of_ranks(self) -> list[tuple[float, int]]:
        """For each rank: the terms of the loss in its data, and their batches or microbatches."""
        return self._of_ranks

    def batches(self) -> Batches:
        """See ``SymmetricOperator._batches``; with several ranks, as they agreed."""
        evaluation, rank = self._evaluation, self.ranks.rank
        if not self.ranks:
            exclusive(evaluation.within_memory)(evaluation.count, "the number of terms")
        counts = [parts for _, parts in self._of_ranks] or [evaluation.loss.count]
        decay = evaluation.options.weight_decay
        return Batches(sum(counts[:rank]), counts[rank], sum(counts), decay)

    def _compare_ways(self) -> None:
        """Raise ValueError if the ranks count terms in ways that give them different weights.

        Each rank finds out on its own data how a loss counts that is not one of torch's.
        """
        found = self.ranks.objects(self._evaluation.loss.way_to_count)
        ways = sorted(set(found) - {""})
        if len(ways) < 2:
            return
        totals = self.ranks.exchanged(lambda: self._evaluation.loss.totals(ways), len(ways))
        if bool(((totals - totals[:, :1]).abs() <= SAME * totals[:, :1]).all()):
            return
        first, other = found.index(ways[0]), found.index(ways[1])
        raise known_to_all(
            InputError(
                f"weights must be given: the loss is a mean over {ways[0]} on rank {first}, but "
                f"over {ways[1]} on rank {other}; pass weights=lambda batch: <its number of terms>"
            )
        )

    def sum(self, outs: Sequence[Tensor], work: Callable[[], None], deferred: bool = False) -> None:
        """Let ``work`` write the share of this rank into ``outs``, and sum them over the ranks.

        If the work fails on one rank, all raise: the others find NaN in the sum, and the reason in
        the store. If ``deferred``, the sum is not read here.
        """
        if not self.ranks:
            work()
            return
        with self._evaluation.loss.gathered.open():
            if not self._evaluation.kept.running:
                self.agree()
            with self.ranks.failing(outs, deferred=deferred):
                work()
        self.ranks.sum_(outs)
        if not deferred and not all(map(finite, outs)):
            self.ranks.check()

    def losses(self, offsets: Sequence[Tensor | None]) -> Tensor:
        """The losses (b,) over the data of all ranks at theta + each offset (n,), on the CPU.

        Each rank has a row of its own in the sum, and the rows are added in the order of the ranks:
        a loss has the same bits in every block.
        """
        ranks = self.ranks
        rows = torch.zeros(ranks.size, len(offsets), dtype=torch.float64, device=ranks.device)
        self.sum([rows], lambda: self._evaluation.add_losses_(rows[ranks.rank], offsets))
        total = torch.zeros(len(offsets), dtype=torch.float64, device="cpu")
        for row in rows.cpu():
            total += row
        return total

    def sum_products(self, requests: Sequence[Request], work: Callable[[], None]) -> None:
        """As ``sum``, for work that answers requests without weight decay, which is then added."""
        deferred, outs = all(r.deferred for r in requests), [r.out for r in requests]
        self.sum(outs, work, deferred)
        if each := [r.each_part.sums for r in requests if r.each_part is not None]:
            self.ranks.sum_(each)
        decay = self._evaluation.options.weight_decay
        for request in requests if decay else ():
            if request.each_part is None:
                request.out.add_(request.V.detach(), alpha=decay)
