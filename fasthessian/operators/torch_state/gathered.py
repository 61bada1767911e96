"""The full parameters of a ``fully_shard`` model during products, by one of two routes.

* ``unshard``: all parameters are gathered before a product or a run of products, and freed after
  it. Kept graphs refer to the same memory, which holds the same values when it is filled again.
* ``regather``: a module that reads a parameter gathers it. Graphs do not keep it: they keep its
  name, and gather it again when a derivative needs it. So few parameters are full at a time. The
  smallest ones (biases, norms) are many and need little memory: they are gathered as by "unshard".

The user's module keeps its shards. During a pass, its tables of parameters are replaced by tables
of full ones. Nothing here acts if the model is not divided (``WHOLE``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthessian.distributed.fsdp import Rounds, Shards
from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.memory import readable
from fasthessian.operators.torch_state.module_state import keep_values
from fasthessian.operators.torch_state.reachable import POINT, Entry
from fasthessian.operators.torch_state.references import References, Table
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, scope
from fasthessian.operators.torch_state.snapshot import Snapshot
from fasthessian.vectors import like, real

R = TypeVar("R")
_keep_version: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
ROUTES = ("unshard", "regather")
SMALL = 0.05  # share of the bytes of all parameters that is not worth gathering again


class Gathered:
    """Full parameters of a model, for the length of a product or of a run.

    Args:
        shards: the model's divided parameters; None if it has none.

    Attributes:
        route: "unshard", "regather", or "" before it is chosen.
        words: text for ``engine``.
    """

    def __init__(self, shards: Shards | None = None) -> None:
        self._shards, self._ranks = shards, ALONE
        self.route = self.words = ""
        self._opened = False
        self._leaves: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}  # by id, of the leaves without memory
        self._shifts: dict[str, Tensor] = {}  # by which parameters are moved in a regather
        self._snapshot: Snapshot | None = None
        self._changes = torch.zeros(1)  # how often the shards of any rank changed
        self._references = References(self._read)

    def __bool__(self) -> bool:
        """Whether the model is divided."""
        return self._shards is not None

    @property
    def regathers(self) -> bool:
        """Whether graphs gather parameters again."""
        return self.route == "regather"

    def group(self, group: Any) -> Any:
        """The process group of the model's mesh, or the user's."""
        return group if self._shards is None or group is not None else self._shards.group()

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError if these are not the ranks of the model's mesh."""
        if self._shards is not None:
            self._shards.check(ranks)

    def lacks(self, p: Tensor) -> bool:
        """Whether this is a leaf without memory."""
        return id(p) in self._names

    @property
    def held(self) -> int:
        """Bytes of full parameters that are kept during a product."""
        return self._size() if self.route == "unshard" else 0

    @property
    def device(self) -> torch.device | None:
        """The device of the divided parameters."""
        if self._shards is None:
            return None
        return next(iter(self._shards.parameters.values())).device  # type: ignore[no-any-return]

    def _size(self) -> int:
        assert self._shards is not None
        dtypes = self._shards.dtypes
        return sum(p.numel() * dtypes[k].itemsize for k, p in self._shards.parameters.items())

    def choose(self, engine: str, ranks: Ranks, room: float) -> None:
        """Choose the route. ``room`` is the number of bytes that full parameters may take.

        Raises:
            ValueError: the engine cannot serve this model.
        """
        if self._shards is None:
            return
        self._ranks, self._rounds = ranks, Rounds(self._shards, ranks)
        size, recurrent = self._size(), self._shards.recurrent
        if engine == "regather" and recurrent:
            raise InputError(
                f"engine must be 'unshard' for this model, got 'regather': the recurrent layer "
                f"{recurrent!r} keeps references to its parameters"
            )
        self.route, why = "unshard", f"within the budget of {readable(room)}"
        if engine in ROUTES:
            self.route, why = engine, "as asked"
        elif engine in ("forward", "difference") or recurrent:
            why = f"which {engine if engine in ('forward', 'difference') else recurrent!r} needs"
        elif ranks.any([size > room])[0]:  # the ranks must take the same route
            self.route, why = "regather", f"above the budget of {readable(room)} of some rank"
        self.words = f"; {self.route}: parameters of {readable(size)} by fully_shard, {why}"
        if self._shards.policies:
            eps = max(torch.finfo(dtype).eps for dtype in self._shards.dtypes.values())
            self.words += (
                f"; MixedPrecisionPolicy({', '.join(sorted(self._shards.policies))}): relative "
                f"error {eps:.1e} of a product; reduce_dtype does not act"
            )
        self._make_leaves(self._shards, SMALL * size if self.regathers else size)

    def _make_leaves(self, shards: Shards, room: float) -> None:
        """Leaves for all parameters, of which the smallest are filled when a scope is opened."""
        parameters = shards.parameters
        for name in sorted(parameters, key=lambda name: parameters[name].numel()):
            p, dtype = parameters[name], shards.dtypes[name]
            room -= p.numel() * dtype.itemsize
            if room >= 0:
                full = torch.empty(p.shape, dtype=dtype, device=p.device)
                full.untyped_storage().resize_(0)
            else:  # one number for all entries, which nothing may read
                full = torch.full((), torch.nan, dtype=dtype, device=p.device).expand(p.shape)
            self._leaves[name] = nn.Parameter(full, requires_grad=p.requires_grad)
            if room < 0:
                self._names[id(self._leaves[name])] = name

    def replaced(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same parameters, of which the divided ones are replaced by leaves of full shape."""
        return {name: self._leaves.get(name, p) for name, p in named.items()}

    # all ranks together

    def open(self) -> Scope[None]:
        """Inside this scope, the full parameters can be used. All ranks enter it together.

        Scopes inside it do nothing, so that a run gathers once.
        """
        return _open(self)

    def _begin(self) -> None:
        """Find the shards, see whether any rank's changed, and gather them."""
        assert self._shards is not None
        shards = self._shards

        def found() -> bool:
            shards.find()
            now: dict[Hashable, Tensor] = {}
            now.update(shards.local())
            if self._snapshot is None:
                self._snapshot = Snapshot(now)
                return False
            written, changed = self._snapshot.compare(now)
            self._snapshot.update(now, [*written, *changed])
            return bool(changed)

        if self._ranks.any([self._ranks.together(found)])[0]:
            self._changes += 1  # also adding 0 would count as a write
        for name, leaf in self._filled():
            with torch.no_grad(), _keep_version(leaf):
                full = shards.full(name)
                storage, size = leaf.untyped_storage(), full.numel() * full.element_size()
                if storage.nbytes() < size:
                    storage.resize_(size)
                leaf.copy_(full)

    def _end(self) -> None:
        self._opened = False
        for _, leaf in self._filled():
            storage = leaf.untyped_storage()
            if storage.resizable():  # it is not after a model exported it to NumPy
                storage.resize_(0)

    def _filled(self) -> list[tuple[str, nn.Parameter]]:
        """The leaves that have memory inside ``open``, in the same order on all ranks."""
        return [(k, leaf) for k, leaf in self._leaves.items() if id(leaf) not in self._names]

    # one rank

    def place(self) -> Scope[None]:
        """Inside this scope, the model computes with full parameters, and without FSDP's hooks."""
        return _place(self)

    def entries(self, seen: set[int]) -> Iterator[Entry]:
        """What the loss depends on: the shards of this rank, and changes of the others'."""
        if self._shards is None:
            return
        for module, _ in self._shards.places():
            seen.update(id(p) for p in module._parameters.values())
        for name, shard in self._shards.local().items():
            yield f"parameter {name!r}", shard, POINT
        yield "a parameter of another rank", self._changes, POINT

    def value(self, p: Tensor) -> Tensor:
        """The value of a parameter, or of a leaf that stands for it."""
        name = self._names.get(id(p))
        return p.detach() if name is None else self._references.full(name)

    def moved_values(self, params: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Tensor]:
        """The values of the parameters moved by these tensors, as ``set_values`` takes them.

        Of a leaf without memory it is the shift.
        """
        moved = [like(shift, p.data) for p, shift in zip(params, shifts, strict=True)]
        pairs = zip(params, moved, strict=True)
        return [shift if self.lacks(p) else p.data + shift for p, shift in pairs]

    def set_values(self, undo: UndoLog, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Until the undo, the parameters have these ``moved_values``."""
        pairs = list(zip(params, values, strict=True))
        plain = [(p, value) for p, value in pairs if not self.lacks(p)]
        keep_values(undo, [p for p, _ in plain])
        undo(setattr, self, "_shifts", self._shifts)
        self._shifts = {self._names[id(p)]: value for p, value in pairs if self.lacks(p)}
        for p, value in plain:
            p.data = value

    def move(self, undo: UndoLog, params: Sequence[Tensor], shifts: Sequence[Tensor]) -> None:
        """Until the undo, the parameters are moved by these tensors."""
        self.set_values(undo, params, self.moved_values(params, shifts))

    def _read(self, name: str) -> Tensor:
        full = self._rounds.gather(name)
        return full + self._shifts[name] if name in self._shifts else full


WHOLE = Gathered()


@scope
def shifted(
    undo: UndoLog, params: Sequence[Tensor], step: float, gathered: Gathered = WHOLE
) -> None:
    """Move the parameters by random numbers of ``step`` times their root mean square."""
    if not step:
        return
    square = sum(float(real(gathered.value(p)).double().square().sum()) for p in params)
    step *= math.sqrt(square / sum(real(p).numel() for p in params)) or 1.0
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for p in params:
        noise = torch.randn(real(p.data).shape, generator=generator, dtype=torch.float32)
        shifts.append(step * noise.to(p.device, p.dtype.to_real()))
    gathered.move(undo, params, shifts)


@scope
def _open(undo: UndoLog, gathered: Gathered) -> None:
    if gathered and not gathered._opened:
        undo(gathered._end)
        gathered._begin()
        gathered._opened = True
        if gathered.regathers:  # ranks may differ in how often they gather
            serving = gathered._ranks.serving
            undo(serving.__setitem__, slice(None), [*serving])
            serving.append(gathered._rounds.finish)


@scope
def _place(undo: UndoLog, gathered: Gathered) -> None:
    shards = gathered._shards
    if shards is None:
        return
    if not gathered._opened:  # the memory of the leaves is empty
        raise UnsupportedError("the parameters of the fully_shard model are not gathered")
    for module, names in shards.places():
        table = {**module._parameters}
        table.update({key: gathered._leaves[name] for key, name in names.items()})
        undo(vars(module).__setitem__, "_parameters", module._parameters)
        vars(module)["_parameters"] = Table(table, gathered._names, gathered._references)
        if isinstance(module, nn.RNNBase):
            undo(vars(module).__setitem__, "_flat_weights", module._flat_weights)
            weights = [getattr(module, name, None) for name in module._flat_weights_names]
            vars(module)["_flat_weights"] = weights
    shards.bypass_hooks(undo)
    if gathered.regathers:
        undo.enter(gathered._references.kept())
