r"""The Lanczos iteration with full reorthogonalisation.

From a random unit vector q_0 it builds an orthonormal basis q_0, q_1, ... of the Krylov space of A,
the rows of V, and the projection T = V A V^T, by one product of A per row (Lanczos 1950). In exact
arithmetic T is tridiagonal; after a thick restart it is an arrow followed by a tridiagonal matrix.
The rows are orthogonalised against all earlier ones by classical Gram-Schmidt, twice, in one of two
schedules.

``dcgs2`` (default) delays the second orthogonalisation of a row to the step after it, where it
shares its passes over V with the first one of the next row: two passes and one reduction per step
(Bielich, Langou, Thomas, Swirydowicz, Yamazaki, Boman 2022, arXiv:2104.01253, there for Arnoldi;
here with the symmetric recurrence). Step j starts from the final rows q_0 .. q_(j-1) of V and a
candidate u for row j that was orthogonalised once; ' is transposition::

    w = A u
    s = V u,  z = V w,  u'u,  u'w                          pass 1: dots
    nu = sqrt(u'u - s's),  t = (u'w - s'z) / nu^2
    q_j = (u - V's) / nu                                   pass 2: update_
    u_next = (w - V'z) / nu - t q_j
    beta_(j-1) = nu,  alpha_j = t - (T s)_j / nu           entries of T: recur_

``cgs2`` orthogonalises w = A q_j twice within step j, in three passes and two reductions::

    h = V w,  w -= V'h,  g = V w,  w -= V'g,  column j of T = h + g,  q_(j+1) = w / |w|

A norm nu within rounding of 0 is a breakdown: V spans an invariant subspace. The run then ends, or
goes on from a random vector orthogonal to V. All numbers of a step stay on the device. On a CPU
each step is checked when it is made. On a GPU steps are only enqueued, and a poll checks the
coefficients of earlier steps while the device goes on; rows after a breakdown are discarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.krylov import basis as bases
from fasthessian.krylov.breakdown import NOISE, Tolerances, judged
from fasthessian.krylov.candidate import draw_, factor_for, next_norm2
from fasthessian.krylov.coefficients import Coefficients, CoefficientsCopy
from fasthessian.krylov.cuda_graph import CapturedStep, obstacle
from fasthessian.krylov.lockstep import Asking, answer
from fasthessian.krylov.space import Space
from fasthessian.krylov.state import RunState
from fasthessian.operators.base import SymmetricOperator, multiply
from fasthessian.operators.request import Request

SCHEDULES = ("dcgs2", "cgs2")
SKEWED = 8  # times eps ||T||: measured 0.1 to 0.5 where products err by rounding, 25 at 1e-5


class Lanczos:
    """A run: a fixed configuration, and all that changes in one ``state``.

    Args:
        A: the operator.
        capacity: rows at most.
        seed, offset: of the stream that the start vector is drawn from.
        signs: start from random signs, else from normals.
        start: (j, n) whole vectors whose sum is a part of the start vector, as long as that one.
        refill: after a breakdown go on from a random vector orthogonal to V, else end.
        schedule: "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: where the rows are kept: "full", "compressed" or "offload" (see ``basis``).
        extra_vectors: vectors that the caller will allocate, for which there must be memory, too.
        graph: on a GPU, replay the step as a CUDA graph where it can be captured.
        deferred: enqueue steps without checking them, until a breakdown; default on GPUs.

    Attributes:
        A, refill, schedule, capacity: as given; capacity is not above A.n.
        space, state: of its vectors; all that changes, see ``RunState``.
        compressed, warm: whether the rows are float16; whether vectors to start from were given.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        capacity: int,
        *,
        seed: int,
        offset: int = 0,
        signs: bool = False,
        start: Tensor | None = None,
        refill: bool = True,
        schedule: str = "dcgs2",
        backend: str | None = None,
        basis: str = "full",
        extra_vectors: int = 0,
        graph: bool = True,
        deferred: bool | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.A, self.capacity, self.refill, self.schedule = A, min(capacity, A.n), refill, schedule
        self.space = Space(A, backend)
        self.compressed = basis == "compressed"
        self._delayed = schedule == "dcgs2"
        self._unread = A.device.type == "cuda" if deferred is None else deferred
        # over ranks the exact norm for a check of each step would take one more collective
        self._deferred = self._unread or (self.space.split and self.compressed)
        self._predicts_norm = self.space.split and self._delayed and not self._deferred
        self._tolerances = Tolerances.of(A.dtype, self.compressed)
        # cgs2 appends its candidate before the product
        rows = self.capacity + (not self._delayed)
        V = bases.allocate(basis, rows, self.space, extra_vectors)
        self.state = RunState(
            basis=V,
            W=self.space.rows(2),
            coefficients=Coefficients(self.capacity, A.device),
            seed=seed,
            drawn=offset,
        )
        self.warm = start is not None
        start = None if start is None else self.space.held(start)
        draw_(self.state, self.space, signs=signs, append=not self._delayed, start=start)
        self._accept(self.state.copy(self._delayed).wait())
        why = obstacle(A, V, self.capacity, wanted=graph, delayed=self._delayed)
        self._captured = CapturedStep(why)

    # the iteration

    def step(self) -> None:
        """One more final row by a product of the operator; see ``advance``."""
        answer(self.advance())

    def advance(self) -> Asking:
        """Ask for one product and make one more final row, unless the space is exhausted."""
        state = self.state
        if state.size >= self.capacity:
            raise InputError(f"the basis is full at {self.capacity} rows; restart it")
        goal = state.size + 1
        while state.size < goal and not state.exhausted:  # a breakdown takes rows away
            if self._captured.captured:  # between two steps a run can be saved
                yield Request(self.A, state.u[:0], state.product[:0], deferred=True)
            # the first product tells how large A is, before steps are captured
            if state.factor is None or not self._captured.make(
                self.A, state.coefficients.counter, state.size, self.delayed_step
            ):
                w = state.product
                yield Request(self.A, state.u, w, self.deferred and self._unread)
                if state.factor is None:
                    state.factor = factor_for(self.space, w)
                state.scaled_(w)
                if self._delayed:
                    self._orthogonalise_delayed(state.size, state.size, state.size)
                else:
                    self._orthogonalise_twice(state.size)
            state.size += 1
            state.exhausted = state.size == self.A.n
            if not self.deferred:
                self._accept(state.copy(self._delayed and not self._predicts_norm).wait())

    def delayed_step(self, made: Tensor, both: Tensor, making: Tensor) -> None:
        """One dcgs2 step, product included, that reads its row from cells of the row counter."""
        u, w = self.state.W[:1], self.state.W[1:]
        multiply([Request(self.A, u, w, self.deferred)])
        self.state.scaled_(w)
        self._orthogonalise_delayed(made, both, making)

    def _orthogonalise_delayed(
        self, made: int | Tensor, both: int | Tensor, making: int | Tensor
    ) -> None:
        """q_j from u, and the next u from w = A u: pass 1, the scalars, pass 2 of ``dcgs2``."""
        V, T = self.state.basis, self.state.coefficients
        C, G = V.dots(self.state.W, count=made)
        H, S = self.space.kernels.recur_(C, G, T.T, T.gauges, count=both, scale=V.scale)
        if isinstance(made, int) and self._predicts_norm:
            T.set_candidate(made + 1, next_norm2(C, G, S))
        V.update_(self.state.W, H, S, count=making, append=True)

    def _orthogonalise_twice(self, j: int) -> None:
        """q_(j+1) from w = A q_j, in the three passes of ``cgs2``."""
        state, V = self.state, self.state.basis
        w = state.product
        h, _ = V.dots(w, count=j + 1)
        g, G = V.dots(w, V.components(h), count=j + 1)
        nu2 = G[0, 0] - (g / V.scale).square().sum()
        S = torch.where(nu2 > 0, nu2, torch.inf).rsqrt().reshape(1, 1)
        V.update_(w, V.components(g), S, count=j + 1, append=True)
        state.candidate = 1 - state.candidate
        state.coefficients.set_row(j, (h + g)[: j + 1, 0] / V.scale, nu2)

    # Ritz pairs and restarts

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ascending (j,), T's eigenvectors (j, j) in columns, residual norms (j,)."""
        T = self.state.T
        values, S = torch.linalg.eigh(T[:-1, :-1])
        unscaled = self.state.unscaled
        return unscaled(values), S, unscaled((self._couplings() @ S).abs())

    def restart(self, keep: Tensor) -> None:
        """Thick restart (Wu, Simon 2000): keep the Ritz vectors of the indices ``keep`` (p,)."""
        state, p = self.state, len(keep)
        values, S = torch.linalg.eigh(state.T[:-1, :-1])
        state.basis.rotate(S[:, keep])
        if not self._delayed:
            state.basis.store(p, state.u[0])
        T = torch.diag(torch.nn.functional.pad(values[keep], (0, 1)))
        T[p, :p] = state.T[-1, :-1] @ S[:, keep]
        state.size = state.judged = state.kept = p
        state.T = T
        state.coefficients.reset(T)
        state.coefficients.set_candidate(p, state.beta**2)

    def renew(self, keep: Tensor) -> None:
        """Restart with Ritz vectors that have converged, and go on from a random direction.

        Their couplings to the candidate are given up, which adds at most ``dropped`` to residuals.
        """
        self.restart(keep)
        self.state.dropped += float(self._couplings().norm())
        self._start_anew()

    def _couplings(self) -> Tensor:
        """q_i'A u for the candidate u; for dcgs2 T's last row holds it over the norm of u."""
        return self.state.T[-1, :-1] * (self.state.beta if self._delayed else 1.0)

    # what is known of the steps made

    @property
    def size(self) -> int:
        """Rows made, final as of the last poll."""
        return self.state.size

    @property
    def ended(self) -> bool:
        """Whether the Krylov space of the start vector ended, so that ``jacobi`` is all of it."""
        return self.state.exhausted or self.state.own is not None

    @property
    def deferred(self) -> bool:
        """Whether steps are enqueued without being checked; not after a breakdown."""
        return self._deferred and self.state.checked_since is None

    @property
    def graph(self) -> str:
        """Whether steps are replayed as a CUDA graph, or why not; and whether a run fell back."""
        row, words = self.state.checked_since, self._captured.words
        fell_back = "" if row is None else f", every step checked since a breakdown at row {row}"
        return words + fell_back

    @property
    def noise(self) -> float:
        """The size under which a residual is rounding of A's dtype: NOISE eps ||T||."""
        T, rounding = self.state.T, NOISE * torch.finfo(self.A.dtype).eps
        noise = self._tolerances.noise(T.numpy(), len(T) - 1) if len(T) > 1 else 0.0
        return self.state.unscaled(rounding / self._tolerances.rounding * noise)

    @property
    def dropped(self) -> float:
        """Bound on what ``renew`` left out of A."""
        return self.state.unscaled(self.state.dropped)

    @property
    def resolution(self) -> float:
        """Eigenvalues closer than this may share a node, lost to float16's rounding; 0 if none."""
        state = self.state
        if state.unscaled(state.lost) <= self.noise:
            return 0.0
        return state.unscaled(self._tolerances.noise(state.T.numpy(), state.size))

    @property
    def exact(self) -> bool:
        """Whether products err by rounding alone, as far as is known or shows in T.

        Errors that are spread over n numbers show in the asymmetry of T as their n^(-1/2)th part.
        """
        eps, state = torch.finfo(self.A.dtype).eps, self.state
        shown = SKEWED * eps * float(state.T.abs().max()) + state.dropped
        return self.A._relative_error() <= eps and state.skew <= shown

    def jacobi(self) -> Tensor:
        """The Jacobi matrix of the start vector: T (j, j), j final rows or those of its space."""
        j = len(self.state.T) - 1 if self.state.own is None else self.state.own
        return self.state.unscaled(self.state.T[:j, :j])

    # how it becomes known

    def poll(self, wait: bool) -> bool:
        """Refresh what is known of the steps made; False if nothing new is known.

        Without ``wait`` a GPU works on: the copy that the poll before the last one began is read,
        and the next one begun, without a kernel.
        """
        state = self.state
        if not self.deferred:
            return True
        if wait:
            state.pending = None
            self._accept(state.copy(self._delayed).wait())
            return True
        earlier, state.pending = state.pending, state.passed_copy(self._delayed)
        if earlier is None:
            return False
        self._accept(earlier.wait())
        return True

    def _accept(self, copy: CoefficientsCopy) -> None:
        """Take over the coefficients and judge their new rows; after a breakdown end or restart."""
        state = self.state
        state.T, state.beta = copy.T, copy.beta
        if copy.final:  # the row holds its norm already
            state.T[-1, :-1] /= state.beta or 1.0
        verdict = judged(self.A, copy, self._tolerances, state)
        state.judged, state.skew = verdict.rows, verdict.skew
        if verdict.rows == self.A.n:
            state.beta = 0.0
        elif verdict.broken:
            if self.deferred:
                state.checked_since = verdict.rows  # a second breakdown may follow soon
            state.discard(verdict.rows, verdict.lost)
            state.exhausted = not self.refill
            self._start_anew()

    def _start_anew(self) -> None:
        """Replace the candidate by a random direction without couplings, unless exhausted."""
        state = self.state
        state.T[-1] = state.T[:, -1] = 0.0
        state.coefficients.reset(state.T)
        if not state.exhausted:
            draw_(state, self.space, signs=False, append=not self._delayed)

    def close(self) -> None:
        """Free the rows and what a captured run holds; the state is unusable afterwards."""
        if self._captured.captured:
            self.A._kept.rebuild()  # A's graphs belong to the capturing stream
        del self.state.basis, self.state.W, self._captured
