"""Whether double backward gives the second derivative of custom autograd functions.

At the first calls of each Python function, the derivative of its backward b(x, u) is compared with
central differences of b. If they disagree, the function is replaced by `functions.Local`. If this
disagrees too, the function is refused. Operations of torch are not checked, because torch's own
tests compare their second derivatives with differences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthessian.memory import out_of_memory
from fasthessian.operators.products.functions import (
    TRANSPOSES,
    WIDER,
    Call,
    Local,
    Optional,
    Treatment,
    differentiated,
    norm,
    outputs,
)
from fasthessian.operators.torch_state.random_state import seeded

LOW = (torch.bfloat16, torch.float16)
# Largest accepted relative distance from differences
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
LOW_TOLERANCE = 0.15
# Steps relative to eps^(1/3); the first is the usual one
STEPS, LOW_STEPS = (1.0, 0.1, 10.0, 100.0), (1.0, 0.4)
LARGEST = 0.1  # largest step in 32 or 64 bits
# Number of random c in c'b. One c misses a wrong term with a probability of about the tolerance
PROBES, FINE_PROBES = 3, 2
INEXACT, NOISY = 2e-2, 0.1  # accepted error of a replacement; the second if differences are noisy
FLOOR = 4.0  # accepted rounding of a difference of b, in units of eps |b| / h
RESOLVED = 0.25  # largest accepted relative distance between the differences of two steps


class Verdict(NamedTuple):
    """The result of the check of a function. The function is right if no field is set."""

    treatment: Treatment | None = None
    wrong: bool = False  # it is wrong and has no treatment
    unknown: bool = False  # differences are inconclusive


RIGHT, WRONG, UNKNOWN = Verdict(), Verdict(wrong=True), Verdict(unknown=True)


class _Trial(NamedTuple):
    """The derivative of b along a direction of one x or u, by differences."""

    place: int
    direction: Tensor
    slope: Sequence[Optional]
    rounding: float  # error of the slope by rounding
    tolerance: float
    mask: Sequence[Optional] | None = None  # True for entries of b where two steps agree
    step: float = 0.0
    error: float = 0.0  # relative error of the slope


def judge(call: Call) -> Verdict:
    """Compare the function's second derivative with differences, at the inputs of a call."""
    verdict = UNKNOWN
    if any(x.dtype in WIDER for x in call.inputs):
        verdict = _judged(call, wide=True)  # differences have less rounding in wider dtypes
    return verdict if verdict.treatment or verdict is RIGHT else _judged(call, wide=False)


def _judged(call: Call, wide: bool) -> Verdict:
    try:
        own = _Judge(call, wide=False)
        if not wide:
            return own.verdict()
        other = _Judge(call.widened(), wide=True)
        return other.verdict() if other.like(own) else UNKNOWN
    except Exception as error:  # the user's code may not accept another call or these dtypes
        if isinstance(error, RuntimeError) and out_of_memory(error) and not wide:
            raise
        return UNKNOWN


class _Judge:
    def __init__(self, call: Call, wide: bool) -> None:
        self._call, self._wide = call, wide
        self._generator = torch.Generator("cpu").manual_seed(0)
        with seeded(0):
            ys = outputs(call.run()[0])
        self._u = [self._random(y if isinstance(y, Tensor) and y.requires_grad else None)
                   for y in ys]  # fmt: skip
        floats = [t for t in (*call.inputs, *self._u) if t is not None]
        low = any(t.dtype in LOW for t in floats)
        self._eps = max(torch.finfo(t.dtype).eps for t in floats)
        usual = self._eps ** (1 / 3)
        self._steps = [usual * f for f in (LOW_STEPS if low else STEPS)]
        if not low:
            self._steps = [usual, *[h for h in self._steps[1:] if h <= LARGEST]]
        self._tolerance = LOW_TOLERANCE if low else max(TOLERANCE[t.dtype] for t in floats)
        self._b = self._slopes(call)
        self._size = _norm(self._b)
        probes = FINE_PROBES if self._tolerance == TOLERANCE[torch.float64] else PROBES
        self._c = [[self._random(g) for g in self._b] for _ in range(probes)]

    def like(self, other: _Judge) -> bool:
        """Whether the gradients agree with those of the same call in another dtype."""
        same = [y is None for y in self._b] == [y is None for y in other._b]
        return same and _norm(_minus(self._b, other._b)) <= other._tolerance * self._size

    def verdict(self) -> Verdict:
        """The verdict on this call."""
        if not self._size:
            return RIGHT
        try:
            made = [self._differentiated(c) for c in self._c]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return RIGHT  # torch raises, so no wrong derivative is returned
        trials, wrong, unknown = [], False, False
        for place, x in enumerate((*self._call.inputs, *self._u)):
            d = self._random(x)
            if d is None:
                continue
            slope, rounding = self._slope(place, d, self._steps[0])
            trial = _Trial(place, d, slope, rounding, self._tolerance, step=self._steps[0])
            if not self._misfit(trial, self._c, made) <= trial.tolerance:
                refined = self._refined(trial)
                if refined is None:
                    unknown = True
                    continue
                trial = refined
                c = [_masked(c, trial.mask) for c in self._c]
                misfit = self._misfit(trial, c, [self._differentiated(each) for each in c])
                wrong |= misfit > trial.tolerance
            trials.append(trial)
        if not wrong:
            return UNKNOWN if unknown else RIGHT
        return WRONG if self._returns_modified_input() else self._treated(trials)

    def _returns_modified_input(self) -> bool:
        """Whether an output is an input that was changed in place; ``Local`` cannot do this."""
        given: list[Any] = []

        def apply(*args: Any) -> Any:
            given.extend(args)
            return self._call.function.apply(*args)  # type: ignore[no-untyped-call]

        with seeded(0):
            out, _ = self._call.run(apply)
        places = {y.data_ptr() for y in outputs(out) if isinstance(y, Tensor)}
        pairs = [(x, y) for x, y in zip(given, self._call.args, strict=True)
                 if isinstance(x, Tensor) and x.data_ptr() in places]  # fmt: skip
        return any(not torch.equal(x, y) for x, y in pairs)

    def _treated(self, trials: Sequence[_Trial]) -> Verdict:
        step, error = max(trial.step for trial in trials), max(trial.error for trial in trials)
        noise = max(trial.tolerance for trial in trials)
        for transpose in TRANSPOSES:
            how = Treatment(transpose, step, error, self._wide)
            apply = functools.partial(Local.apply, how, self._call.function)
            misfit = 0.0
            try:
                for trial in trials:
                    c = [_masked(c, trial.mask) for c in self._c]
                    made = [self._differentiated(each, apply) for each in c]
                    misfit = max(misfit, self._misfit(trial, c, made))
            except (RuntimeError, ValueError) as error_:
                if isinstance(error_, RuntimeError) and out_of_memory(error_):
                    raise
                continue
            # an approximate gradient (of an adaptive solver, for example) has an error of this size
            if misfit <= max(INEXACT, self._tolerance, min(NOISY, noise)):
                return Verdict(how._replace(error=max(error, misfit)))
        return WRONG

    def _refined(self, trial: _Trial) -> _Trial | None:
        """The slope by the two steps that agree best, masked; None if no two steps agree."""
        steps = sorted(self._steps)
        found = [self._slope(trial.place, trial.direction, step) for step in steps]
        best: _Trial | None = None
        for i, step in enumerate(steps[1:]):
            (a, _), (b, rounding) = found[i], found[i + 1]
            mask = _agreement(a, b, step / steps[i])
            a, b = _masked(a, mask), _masked(b, mask)
            gap, size = _norm(_minus(a, b)), _norm(b)
            error = gap / size if size else float(gap > 0)
            if best is None or error < best.error:
                tolerance = max(self._tolerance, 4 * error)
                best = _Trial(
                    trial.place, trial.direction, b, rounding, tolerance, mask, step, error
                )
        return best if best is not None and best.error <= RESOLVED else None

    def _misfit(
        self, trial: _Trial, c: Sequence[Sequence[Optional]], made: Sequence[Sequence[Optional]]
    ) -> float:
        """The relative distance of a derivative from the slope, minus rounding."""
        gaps = [
            abs(_dot([by[trial.place]], [trial.direction]) - _dot(each, trial.slope))
            for each, by in zip(c, made, strict=True)
        ]
        beyond = max(gaps) - FLOOR * trial.rounding
        if math.isnan(beyond):
            return math.inf
        return beyond / (_norm(trial.slope) or 1e-300) if beyond > 0 else 0.0

    def _slope(self, place: int, d: Tensor, step: float) -> tuple[Sequence[Optional], float]:
        """The derivative of b along d, and its error by rounding."""
        count = len(self._call.at)
        if place < count:
            directions: list[Optional] = [None] * count
            directions[place] = d
            slope, h = self._call.difference(self._slopes, directions, step)
        else:
            h = step  # both u and d are of N(0, 1)
            ends = []
            for shift in (h, -h):
                there = [y if y is None or i != place - count else torch.add(y, d, alpha=shift)
                         for i, y in enumerate(self._u)]  # fmt: skip
                ends.append(self._slopes(self._call, there))
            slope = [None if y is None else y / (2 * h) for y in _minus(*ends)]
        return slope, self._eps * self._size / h

    def _slopes(self, call: Call, u: Sequence[Optional] | None = None) -> list[Optional]:
        with seeded(0):
            return call.slopes(self._u if u is None else u)

    def _differentiated(
        self, c: Sequence[Optional], apply: Callable[..., object] | None = None
    ) -> list[Optional]:
        with seeded(0):
            by_x, by_u = differentiated(self._call, self._u, c, apply)
        return [*by_x, *by_u]

    def _random(self, like: Optional) -> Optional:
        if like is None:
            return None
        made = torch.randn(like.shape, generator=self._generator, dtype=torch.float64, device="cpu")
        return made.to(like)


def _agreement(a: Sequence[Optional], b: Sequence[Optional], ratio: float) -> list[Optional]:
    """Masks of the entries where two slopes agree; b's step is ``ratio`` times as large as a's.

    They disagree at a kink. There, the two ends of both steps lie on different sides of the kink,
    or the gap is far larger than for other entries.
    """
    found: list[Optional] = []
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            found.append(None)
            continue
        x, y = x.double(), y.double()
        gap, near = (x - y).abs(), 0.1 * (x.abs() + y.abs())
        sides = (gap > near) & ((x - ratio * y).abs() <= 0.1 * (x.abs() + ratio * y.abs()))
        usual = 10 * gap.masked_fill(sides, math.nan).nanmedian().nan_to_num(0.0)
        found.append(~sides & (gap <= torch.maximum(usual, near)) & gap.isfinite())
    return found


def _masked(x: Sequence[Optional], mask: Sequence[Optional] | None) -> Sequence[Optional]:
    if mask is None:
        return x
    return [None if y is None or m is None else torch.where(m, y, 0)
            for y, m in zip(x, mask, strict=True)]  # fmt: skip


def _minus(a: Sequence[Optional], b: Sequence[Optional]) -> list[Optional]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def _dot(a: Sequence[Optional], b: Sequence[Optional]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _norm(x: Sequence[Optional]) -> float:
    return math.hypot(*[norm(y) for y in x if y is not None])
