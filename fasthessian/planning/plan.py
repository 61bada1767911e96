"""The plan of a run: every choice of basis, sharding and wrapping with its memory and its time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from fasthessian.errors import InputError
from fasthessian.planning.machines import Machine
from fasthessian.planning.model import GATHERS, LARGEST, WRAPS, Model
from fasthessian.planning.steps import BASES, Collective, KrylovSize

MARGIN = 1.25  # of the wall time to ask for, over the estimate
START = 300.0  # seconds to start processes and load model and data: assumed
MOST = 1 << 50  # parameters: no memory holds so many
MOST_RANKS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run on a machine."""

    n: int  # parameters
    machine: Machine
    ranks: int = 1
    steps: int = 100
    pairs: int = 0
    dtype: str = "float32"
    product_seconds: float | None = None  # of one product on a rank, without communication
    activations: int = 0  # bytes
    largest: float = LARGEST  # module, as a part of the model

    def __post_init__(self) -> None:
        """Raise ValueError for ranks that do not fill their nodes."""
        g = self.machine.ranks_per_node
        if g is not None and self.ranks > g and self.ranks % g:
            raise InputError(
                f"--ranks {self.ranks} must be a multiple of the {g} ranks per node; use --ranks "
                f"{-(-self.ranks // g) * g}, or --ranks-per-node {math.gcd(self.ranks, g)}"
            )


@dataclasses.dataclass(frozen=True)
class Seconds:
    """The time of an average step, by what it goes to; None: not known. Nothing overlaps."""

    product: float | None  # computing on a rank
    gathers: float | None  # of parameters
    streams: float | None  # memory traffic of the orthogonalisation
    collectives: float | None  # of vectors and scalars

    @property
    def total(self) -> float | None:
        """The sum, if all parts are known."""
        parts = (self.product, self.gathers, self.streams, self.collectives)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A basis, replicated or sharded, with a wrapping of the model, and what they need."""

    basis: str
    sharded: bool
    wrap: str
    model_bytes: int  # on the device of one rank, without the Krylov space
    space_bytes: int  # the Krylov space there
    host_bytes: int  # pinned, of one rank
    fits: bool | None  # None: a memory is not known
    collectives: tuple[Collective, ...]  # of the step in the middle of the run
    sent_bytes: float  # by a rank in that step
    gathered_bytes: float  # parameters that a rank sends for one product
    streamed_bytes: float  # of the basis, read by a rank in that step
    step: Seconds  # of that step, which is the average one
    run_seconds: float | None
    checkpoint_bytes: int  # all ranks together, after the last step
    checkpoint_seconds: float | None
    largest_params: int | None  # the largest model that fits; None: not known
    most_steps: int | None  # that fit, n at most; None: not known

    @property
    def device_bytes(self) -> int:
        """All that the device of a rank must hold."""
        return self.model_bytes + self.space_bytes

    @property
    def wall_seconds(self) -> float | None:
        """Wall time to ask for: the estimate and a quarter, two checkpoints, and the start."""
        if self.run_seconds is None:
            return None
        return MARGIN * self.run_seconds + 2 * (self.checkpoint_seconds or 0.0) + START


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is asked for, and the choices there are."""

    asked: Asked
    bases: tuple[str, ...]
    wraps: tuple[str, ...]
    choices: tuple[Choice, ...]  # in the order of bases, replicated before sharded, and of wraps

    @property
    def recommended(self) -> Choice | None:
        """The choice to take: the first basis of BASES that fits, and its fastest choice that fits.

        Full rows are exact and need no refinement; compressed ones are accurate to 2e-4; offloaded
        ones are exact but slow; no basis gives no eigenvectors. If times are not known, the choice
        that moves the fewest bytes counts as the fastest. Of equals the first is taken, which is
        the simplest.

        Returns:
            None if nothing fits. Where the memory is not known, everything fits.
        """
        fitting = [each for each in self.choices if each.fits is not False]
        if not fitting:
            return None
        basis = min((each.basis for each in fitting), key=BASES.index)

        def cost(each: Choice) -> tuple[float, float]:
            moved = each.sent_bytes + each.gathered_bytes + each.streamed_bytes
            parts = each.step.gathers, each.step.streams, each.step.collectives
            known = [part for part in parts if part is not None]
            return (sum(known) if len(known) == len(parts) else math.inf, moved)

        return min((each for each in fitting if each.basis == basis), key=cost)

    @property
    def enough_ranks(self) -> int | None:
        """The ranks with which something fits, in doublings; None if no number of ranks helps."""
        ranks, node = self.asked.ranks, self.asked.machine.ranks_per_node or 1
        fits = self.recommended is not None
        while not fits and ranks < MOST_RANKS:
            ranks *= 2
            if ranks > node:
                ranks = -(-ranks // node) * node
            more = dataclasses.replace(self.asked, ranks=ranks)
            fits = plan(more, self.bases, self.wraps).recommended is not None
        return ranks if fits else None


def plan(asked: Asked, bases: Sequence[str] = BASES, wraps: Sequence[str] = WRAPS) -> Plan:
    """The plan of a run.

    One rank has nothing to shard. Without a basis there are no eigenvectors, so that this is left
    out if pairs are wanted; so are offloaded rows without a GPU.

    Raises:
        ValueError: no choice is left.

    Example:
        >>> from fasthessian.planning.machines import MACHINES
        >>> asked = Asked(n=10**9, machine=MACHINES["h100"], ranks=8, product_seconds=1.0)
        >>> made = plan(asked, wraps=("plain",))
        >>> [(each.basis, each.sharded) for each in made.choices if each.fits is False]
        [('full', False), ('compressed', False)]
        >>> made.recommended.basis, made.recommended.sharded
        ('full', True)
    """
    left = [basis for basis in bases if basis != "offload" or asked.machine.gpu]
    if not left:
        raise InputError(
            "--basis offload keeps rows of a GPU in host memory, but the machine has no GPU; use "
            "--basis compressed"
        )
    left = [basis for basis in left if basis != "none" or not asked.pairs]
    if not left:
        raise InputError(
            f"--pairs {asked.pairs} needs eigenvectors, which --basis none does not give; use "
            f"--basis compressed, or --pairs 0"
        )
    wrapped = [wrap for wrap in wraps if wrap == "plain" or asked.ranks > 1]
    if not wrapped:
        raise InputError(
            f"--wrap {wraps[0]} shards a model over several ranks; use --wrap plain, or raise "
            f"--ranks"
        )
    choices = tuple(
        choice(asked, basis, sharded, wrap)
        for basis in left
        for sharded in ((False, True) if asked.ranks > 1 else (False,))
        for wrap in wrapped
    )
    return Plan(asked, tuple(bases), tuple(wraps), choices)


def choice(asked: Asked, basis: str, sharded: bool, wrap: str) -> Choice:
    """One choice."""
    machine = asked.machine

    def parts(n: int, steps: int) -> tuple[KrylovSize, Model]:
        space = KrylovSize(n, asked.ranks, steps, asked.pairs, asked.dtype, basis, sharded)
        model = Model(n, asked.ranks, asked.dtype, wrap, asked.largest, asked.activations)
        return space, model

    def fits(n: int, steps: int) -> bool | None:
        space, model = parts(n, steps)
        limits = [(machine.memory, model.device_bytes + space.device_bytes(machine.memory))]
        if basis == "offload":
            limits.append((machine.host_memory, space.host_bytes))
        known = [needs <= limit for limit, needs in limits if limit is not None]
        if not all(known):
            return False
        return True if len(known) == len(limits) else None

    space, model = parts(asked.n, asked.steps)
    middle = (space.rows - 1) / 2  # rows before the average step
    made = space.collectives(int(middle))
    step = step_seconds(asked, space, model, middle)
    # eigenpairs of compressed rows are refined by a product each
    products = space.rows + (asked.pairs if basis == "compressed" else 0)
    disk, known = machine.disk_bandwidth, fits(1, 1) is not None
    return Choice(
        basis=basis,
        sharded=sharded,
        wrap=wrap,
        model_bytes=model.device_bytes,
        space_bytes=space.device_bytes(machine.memory),
        host_bytes=space.host_bytes,
        fits=fits(asked.n, asked.steps),
        collectives=made,
        sent_bytes=sum(each.sent(asked.ranks) for each in made),
        gathered_bytes=GATHERS[wrap] * model.gathering.sent(asked.ranks),
        streamed_bytes=space.streamed_bytes(middle),
        step=step,
        run_seconds=None
        if step.total is None
        else products * step.total + model.start_seconds(machine),
        checkpoint_bytes=space.checkpoint_bytes,
        checkpoint_seconds=None if disk is None else space.checkpoint_bytes / disk,
        largest_params=largest(lambda n: bool(fits(n, asked.steps))) if known else None,
        most_steps=largest(lambda m: bool(fits(asked.n, m)), asked.n) if known else None,
    )


def step_seconds(asked: Asked, space: KrylovSize, model: Model, rows: float) -> Seconds:
    """The time of a step after ``rows`` rows.

    All parts are linear in the rows, so that a step in the middle of a run takes the average time::

        product + gathers + basis / bandwidth + other vectors / bandwidth + collectives

    Bandwidths are of the memory. Rows of an offloaded basis come through the link to the host.
    """
    machine = asked.machine
    link = machine.host_bandwidth if space.basis == "offload" else machine.memory_bandwidth
    streams = None
    if link is not None and machine.memory_bandwidth is not None:
        streams = space.streamed_bytes(rows) / link + space.moved_bytes / machine.memory_bandwidth
    times = [machine.seconds(each, asked.ranks) for each in space.collectives(int(rows))]
    known = [time for time in times if time is not None]
    collectives = sum(known) if len(known) == len(times) else None
    return Seconds(asked.product_seconds, model.gather_seconds(machine), streams, collectives)


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest count up to ``most`` that fits, 0 if none does; if one fits, so do smaller ones.

    Example:
        >>> largest(lambda n: n * n <= 50), largest(lambda n: True, 9), largest(lambda n: False)
        (7, 9, 0)
    """
    if fits(most):
        return most
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
