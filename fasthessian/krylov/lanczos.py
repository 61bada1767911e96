"""The Krylov engine that eigsh, density and the drop-in share.

One basis V of orthonormal rows, grown by one product a step, with full reorthogonalisation by one
of two schedules over the kernel contract:

* ``dcgs2`` (default): delayed classical Gram-Schmidt, two streams of V and one reduction a step.
  The candidate u is orthogonalised a second time together with the first time of w = H u
  (Bielich, Langou, Thomas, Swirydowicz, Yamazaki, Boman 2022, arXiv:2104.01253, for Arnoldi; here
  with the symmetric recurrence).
* ``cgs2``: classical Gram-Schmidt twice, three streams.

All numbers of a step stay on the device. On a CPU each step is looked at when it is made; on a GPU
steps are only enqueued, and a look (``look``) reads the state of some steps ago while the device
works on. A candidate that turns out to have held nothing new takes the later rows back with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import InputError
from fasthessian.kernels.contract import CANCELLED
from fasthessian.krylov import basis as bases
from fasthessian.krylov.coefficients import Ledger, State
from fasthessian.krylov.cuda_graph import Replay
from fasthessian.krylov.dots import gram
from fasthessian.krylov.lockstep import Asking, answer
from fasthessian.krylov.rows import Rows
from fasthessian.operators.base import ASYMMETRY, SymmetricOperator, multiply
from fasthessian.operators.request import Request
from fasthessian.vectors import empty_rows

SCHEDULES = ("dcgs2", "cgs2")
NOISE = 16  # times eps ||T||: what rounding leaves of an exact zero, here and in residuals
HALF_NOISE = 1e-3  # of ||T||: the same for rows rounded to float16, relative error 2^-12 each


class Lanczos(Rows):
    """A growing orthonormal basis V of a Krylov space and the projection T = V H V^T.

    Args:
        A: the operator.
        capacity: rows at most.
        seed, offset: of the stream that the start vector is drawn from.
        signs: start from random signs, else from normals.
        refill: go on from a fresh random direction where an invariant subspace is met.
        schedule: "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: where the rows are kept: "full", "compressed" or "offload" (see ``basis``).
        beside: vectors that the caller will make beside the basis, which have to fit too.
        graph: on a GPU, replay the step as a CUDA graph where it can be captured.
        deferred: enqueue steps without looking at them, until a breakdown; default on GPUs.

    Attributes:
        seed: of the random vectors.
        basis: the rows; the first ``size`` are final.
        compressed: whether they are float16.
        W: (2, n) working rows: the candidate and its product.
        size: final rows, as far as is known.
        T: (size + 1, size + 1) float64 on the CPU, as of the last look: V H V^T and, in its last
            row, the candidate's couplings.
        beta: norm of the candidate at the last look.
        exhausted: the rows span the whole space, or an invariant subspace was met and
            ``refill`` is False.
        replay: "captured", or why steps are not replayed as a CUDA graph.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        capacity: int,
        *,
        seed: int,
        offset: int = 0,
        signs: bool = False,
        refill: bool = True,
        schedule: str = "dcgs2",
        backend: str | None = None,
        basis: str = "full",
        beside: int = 0,
        graph: bool = True,
        deferred: bool | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.A, self.capacity, self.refill = A, min(capacity, A.n), refill
        self.deferred = A.device.type == "cuda" if deferred is None else deferred
        self.delayed = schedule == "dcgs2"
        self.kernels = kernels.select(A.device, backend)
        # cgs2 appends its candidate before the product
        rows = self.capacity + (not self.delayed)
        self.basis = bases.allocate(basis, rows, A.n, A.dtype, A.device, self.kernels, beside)
        self.W = empty_rows(2, A.n, A.dtype, A.device)
        self._u = 0  # the row of W that holds the candidate
        self.ledger = Ledger(self.capacity, A.device)
        self._pending: State | None = None
        self.compressed = basis == "compressed"
        self._rounding = HALF_NOISE if self.compressed else NOISE * torch.finfo(A.dtype).eps
        self._asymmetry = 10 * ASYMMETRY[torch.float32 if self.compressed else A.dtype]
        self.seed, self._drawn = seed, offset
        self._factor: float | None = None  # of products, known after the first one
        self._skew = 0.0  # how far q_i'Aq_j and q_j'Aq_i differ at most, in units of T
        self._dropped = 0.0  # couplings given up by ``renew``, in units of T
        self.T = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
        self.beta = 1.0
        self.size = self._judged = 0
        self._begun = 0  # rows kept by the last restart
        self.exhausted = self.broke_down = False
        self._own: int | None = None  # rows before the first breakdown, once there was one
        self._left = 0.0  # norm of the candidate that was last taken for rounding of the rows
        self._draw(signs)
        self._accept(self._state().wait())
        self._replay = Replay(self, graph)

    @property
    def replay(self) -> str:
        """Whether steps are replayed as a CUDA graph, or why not."""
        return self._replay.words

    @property
    def noise(self) -> float:
        """The size under which a residual is rounding of A's dtype: NOISE eps ||T||."""
        size = len(self.T) - 1
        rounding = NOISE * torch.finfo(self.A.dtype).eps
        return self._unscaled(rounding / self._rounding * self._noise_of(size)) if size else 0.0

    @property
    def dropped(self) -> float:
        """Bound on what ``renew`` left out of A, in the Euclidean norm."""
        return self._unscaled(self._dropped)

    @property
    def blur(self) -> float:
        """The size under which what was left of A was lost to float16's rounding; 0 if nothing."""
        left = self._unscaled(self._left)
        return self._unscaled(self._noise_of(self.size)) if left > self.noise else 0.0

    @property
    def ended(self) -> bool:
        """Whether the Krylov space of the start vector ended, so that ``jacobi`` is all of it."""
        return self.exhausted or self._own is not None

    def jacobi(self) -> Tensor:
        """The Jacobi matrix of the start vector: T (j, j), j final rows or those of its space."""
        j = len(self.T) - 1 if self._own is None else self._own
        return self._unscaled(self.T[:j, :j])

    def step(self) -> None:
        """One more final row by a product of the operator; see ``advance``."""
        answer(self.advance())

    def advance(self) -> Asking:
        """Ask for one product and make one more final row, unless the space is exhausted."""
        if self.size >= self.capacity:
            raise InputError(f"the basis is full at {self.capacity} rows; restart it")
        goal = self.size + 1
        while self.size < goal and not self.exhausted:
            # the first product tells how large A is, before steps are captured
            if self._factor is None or not self._replay.step(self):
                u, w = (self.W[i][None] for i in (self._u, 1 - self._u))
                yield Request(self.A, u, w, self.deferred)
                if self._factor is None:
                    self._factor = self._chosen_factor(w)
                self._scale_(w)
                self._absorb()
            self.size += 1
            self.exhausted = self.size == self.A.n
            if not self.deferred:
                self._accept(self._state().wait())

    def look(self, wait: bool) -> bool:
        """Refresh ``T``, ``beta`` and ``size``; False if nothing new is known.

        Without ``wait`` the state of the last but one look is read, which the device has left
        behind, and the steps since then go on undisturbed: no kernel is launched for it.
        """
        if not self.deferred:
            return True
        if wait:
            self._pending = None
            self._accept(self._state().wait())
            return True
        earlier, self._pending = self._pending, self._passed_state()
        if earlier is None:
            return False
        self._accept(earlier.wait())
        return True

    def close(self) -> None:
        """Give back the rows, and what a captured run holds: A's graphs belong to its stream."""
        if self.replay == "captured":
            self.A._kept.rebuild()
        del self.basis, self.W, self._replay

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ascending (j,), T's eigenvectors (j, j) in columns, residual norms (j,)."""
        j = len(self.T) - 1
        values, S = torch.linalg.eigh(self.T[:j, :j])
        return self._unscaled(values), S, self._unscaled((self._couplings() @ S).abs())

    def restart(self, keep: Tensor) -> None:
        """Thick restart (Wu, Simon 2000): keep the Ritz vectors of the indices ``keep`` (p,)."""
        j, p = len(self.T) - 1, len(keep)
        values, S = torch.linalg.eigh(self.T[:j, :j])
        self.basis.rotate(S[:, keep])
        if not self.delayed:
            self.basis.store(p, self.W[self._u])
        T = torch.diag(torch.nn.functional.pad(values[keep], (0, 1)))
        T[p, :p] = self.T[-1, :-1] @ S[:, keep]
        self.size = self._judged = self._begun = p
        self.T = T
        self.ledger.rewrite(T)
        self.ledger.candidate(p, self.beta**2)

    def renew(self, keep: Tensor) -> None:
        """Restart with Ritz vectors that have converged, and go on from a random direction.

        Their couplings to the candidate are given up, which adds at most ``dropped`` to residuals.
        """
        self.restart(keep)
        self._dropped += float(self._couplings().norm())
        self._start_anew()

    def delayed_step(self, made: int | Tensor, both: int | Tensor, making: int | Tensor) -> None:
        """One dcgs2 step; the counts are numbers, or cells of the ledger's counter."""
        multiply([Request(self.A, self.W[:1], self.W[1:], self.deferred)])
        self._scale_(self.W[1:])
        self._absorb_delayed(made, both, making)

    def _absorb(self) -> None:
        """Orthogonalise the product of the candidate, and make the candidate a final row."""
        if self.delayed:
            self._absorb_delayed(self.size, self.size, self.size)
        else:
            self._absorb_classical()

    def _absorb_delayed(self, made: int | Tensor, both: int | Tensor, making: int | Tensor) -> None:
        C, G = self.basis.dots(self.W, count=made)
        H, S = self.kernels.recur_(
            C, G, self.ledger.T, self.ledger.gauges, count=both, scale=self.basis.scale
        )
        self.basis.update_(self.W, H, S, count=making, append=True)

    def _absorb_classical(self) -> None:
        j, scale, basis = self.size, self.basis.scale, self.basis
        w = self.W[1 - self._u][None]
        first, _ = basis.dots(w, count=j + 1)
        second, G = basis.dots(w, basis.coefficients(first), count=j + 1)
        nu2 = G[0, 0] - (second / scale).square().sum()
        S = torch.where(nu2 > 0, nu2, torch.inf).rsqrt().reshape(1, 1)
        basis.update_(w, basis.coefficients(second), S, count=j + 1, append=True)
        self._u = 1 - self._u
        self.ledger.write(j, (first + second)[: j + 1, 0] / scale, nu2)

    def _couplings(self) -> Tensor:
        """q_i'H u for the candidate u; T's last row has it but for the norm of a delayed one."""
        return self.T[-1, :-1] * (self.beta if self.delayed else 1.0)

    def _state(self) -> State:
        """The ledger with the candidate's norm, on its way to the host."""
        if self.delayed:
            self.ledger.candidate(self.size, gram(self.kernels, self.W[:1])[0, 0])
        return State(self.ledger, self.size)

    def _passed_state(self) -> State | None:
        """The same without a kernel: of the last row but one where only a step knows the norm."""
        if not self.delayed:
            return State(self.ledger, self.size)
        return State(self.ledger, self.size - 1, final=True) if self.size > self._begun else None

    def _accept(self, state: State) -> None:
        """Take a state over; look for a breakdown and for asymmetry in its new rows."""
        self.T, gauges = state.T, state.gauges
        self.beta = math.sqrt(max(float(gauges[-1, 0]), 0.0))
        if state.final:  # its norm is in the row already
            self.T[-1, :-1] /= self.beta or 1.0
        broken, left = state.size, self.beta
        for j in range(self._judged, state.size):
            uu, nu2, asymmetry = gauges[j].tolist()
            scale = float(self.T[: j + 1, : j + 1].abs().max())
            if not all(map(math.isfinite, (uu, nu2, asymmetry, scale))):
                raise InputError(f"{self.A} returned NaN or Inf for a finite vector")
            if not nu2 > CANCELLED * uu:
                broken, left = j, 0.0
                break
            if self._is_noise(j, math.sqrt(uu)):
                broken, left = j, math.sqrt(uu)
                break
            self._skew = max(self._skew, asymmetry)
            if asymmetry > self._asymmetry * scale + self._dropped:
                raise InputError(
                    f"A is not symmetric: q_i'Aq_j and q_j'Aq_i differ by {asymmetry:.3g} "
                    f"at a scale of {scale:.3g}; pass a symmetric operator"
                )
        self._judged = broken
        if broken == self.A.n:
            self.beta = 0.0
        elif broken < state.size or self._is_noise(broken, self.beta):
            self._left = left
            self._take_back(broken)

    def _is_noise(self, j: int, norm: float) -> bool:
        """Whether a candidate behind j rows is what rounding left; a fresh one never is."""
        return bool(self.T[j, :j].any()) and norm <= self._noise_of(j)

    def _noise_of(self, j: int) -> float:
        return self._rounding * float(self.T[:j, :j].abs().sum(1).max())

    def _take_back(self, size: int) -> None:
        """Drop the rows from ``size`` on; the run ends or goes on from a fresh direction."""
        self._pending = None
        self.broke_down, self.deferred = True, False  # what ended once may end soon again
        self._own = size if self._own is None else self._own
        self.size = self._judged = size
        self.beta = 0.0
        self.T = self.T[: size + 1, : size + 1].clone()
        self.exhausted = not self.refill
        self._start_anew()

    def _start_anew(self) -> None:
        """Replace the candidate by a random direction without couplings, unless exhausted."""
        self.T[-1] = self.T[:, -1] = 0.0
        self.ledger.rewrite(self.T)
        if not self.exhausted:
            self._draw(signs=False)
