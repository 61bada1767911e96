"""Models that ``fully_shard`` (FSDP2) divides over ranks: their shards, hooks and full parameters.

FSDP's hooks on modules hide second derivatives: torch 2.13 raises, or gives gradients without a
graph. So products bypass these hooks: they put full parameters of their own into the modules, and
FSDP's own state (its streams, prefetching, gradients, first call) is never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError, UnsupportedError

FSDP = "torch.distributed.fsdp"
Undo = Callable[..., None]  # undo(function, *args) records how a change is undone
_MISSING = object()


def is_distributed(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and needed to make one
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_modules(model: Any) -> list[Any]:
    """The modules inside ``model`` that ``fully_shard`` was called on."""
    kind = getattr(sys.modules.get(FSDP), "FSDPModule", None)
    if kind is None or not isinstance(model, nn.Module):
        return []
    return [module for module in model.modules() if isinstance(module, kind)]


def not_supported(name: str, p: Tensor) -> UnsupportedError:
    """The error for a DTensor whose products would be wrong."""
    return UnsupportedError(
        f"parameter {name!r} is a DTensor with placements {p.placements}: tensor parallelism is "  # type: ignore[attr-defined]
        f"not supported, only fully_shard; analyse the model without parallelize_module, with the "
        f"parameters of get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
    )


class Shards:
    """The parameters of a model that are divided over ranks.

    Args:
        model: a module that ``fully_shard`` was called on, or whose children it was called on.

    Attributes:
        parameters: the divided parameters by name, as DTensors.
        dtypes: the dtypes that the modules compute with, by name; see ``MixedPrecisionPolicy``.
        policies: the options of a ``MixedPrecisionPolicy`` that change a dtype.

    Raises:
        RuntimeError: a kind of division that is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._units = model, sharded_modules(model)
        self.parameters: dict[str, Any] = {}
        self.find()
        casts: dict[int, torch.dtype | None] = {}  # by the id of the parameter
        self.policies: set[str] = set()
        for unit in reversed(self._units):  # a unit owns what no unit inside it owns
            policy = unit._get_fsdp_state()._mp_policy
            for p in unit.parameters():
                casts.setdefault(id(p), policy.param_dtype)
            for name in ("param_dtype", "output_dtype"):
                if getattr(policy, name) is not None:
                    self.policies.add(f"{name}={getattr(policy, name)}".replace("torch.", ""))
        self.dtypes: dict[str, torch.dtype] = {}
        for name, p in self.parameters.items():
            cast = casts.get(id(p)) if p.is_floating_point() else None
            self.dtypes[name] = cast or p.dtype
            _check(name, p)
        meshes = {tuple(p.device_mesh.mesh.flatten().tolist()) for p in self.parameters.values()}
        if len(meshes) > 1:
            raise UnsupportedError(
                f"model is divided over {len(meshes)} meshes of different ranks, which is not "
                f"supported; call fully_shard with one mesh"
            )
        (self._members,) = meshes
        self._mesh = next(iter(self.parameters.values())).device_mesh

    def group(self) -> Any:
        """The mesh, or the process group of all ranks.

        Raises:
            ValueError: a mesh with replicas does not hold all ranks.
        """
        if self._mesh.ndim == 1:
            return self._mesh
        if len(self._members) == dist.get_world_size():
            return dist.group.WORLD
        raise InputError(
            f"group must be given for a mesh of {self._mesh.ndim} dimensions that are not all "
            f"ranks, got None; pass group=torch.distributed.new_group({list(self._members)})"
        )

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError if these are other ranks than those of the mesh."""
        if sorted(ranks.members) != sorted(self._members):
            raise InputError(
                f"group must hold the ranks of the mesh of this fully_shard model, "
                f"{sorted(self._members)}, got {sorted(ranks.members)}; use group=None"
            )

    def find(self) -> None:
        """Reshard all modules, and find the parameters again.

        Raises:
            RuntimeError: a parameter was added, removed, or changed its shape or dtype.
        """
        for unit in self._units:
            unit.reshard()  # no collective; after a forward pass the root may be unsharded
        named = dict(self._model.named_parameters())
        found = {name: p for name, p in named.items() if is_distributed(p)}
        old = {name: (p.shape, p.dtype) for name, p in self.parameters.items()}
        if old and old != {name: (p.shape, p.dtype) for name, p in found.items()}:
            raise UnsupportedError(
                "the parameters of the fully_shard model changed their names, shapes or dtypes; "
                "build a new Hessian"
            )
        self.parameters = found

    def local(self) -> dict[str, Tensor]:
        """The shards of this rank."""
        with torch.no_grad():
            return {name: p.to_local() for name, p in self.parameters.items()}

    def full(self, name: str) -> Tensor:
        """The full parameter of this name, in memory of its own. All ranks of the mesh call it."""
        p = self.parameters[name].detach()
        with torch.no_grad():
            found: Tensor = p.to(self.dtypes[name]).full_tensor()
            own = found.untyped_storage().data_ptr() != p.to_local().untyped_storage().data_ptr()
            return found.contiguous() if own else found.clone()  # one rank: it is the shard itself

    @property
    def recurrent(self) -> str:
        """The name of a recurrent layer; "" if there is none."""
        named = self._model.named_modules()
        return next((name for name, module in named if isinstance(module, nn.RNNBase)), "")

    def places(self) -> list[tuple[nn.Module, dict[str, str]]]:
        """Each module that holds divided parameters, and their full names by attribute."""
        names = {id(p): name for name, p in self.parameters.items()}
        found = []
        for module in self._model.modules():
            held = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
            if held:
                found.append((module, held))
        return found

    def bypass_hooks(self, undo: Undo) -> None:
        """Until the undo, FSDP's hooks only cast inputs and outputs, as ``MixedPrecisionPolicy``.

        Methods that ``register_fsdp_forward_method`` wrapped call the same two functions.
        """
        for unit in self._units:
            state = unit._get_fsdp_state()
            before, after = _casts(state._mp_policy)
            for name, function in (("_pre_forward", before), ("_post_forward", after)):
                undo(_put_back, vars(state), name, vars(state).get(name, _MISSING))
                vars(state)[name] = function
            for table, function in (
                (unit._forward_pre_hooks, before),
                (unit._forward_hooks, after),
            ):
                for key, hook in list(table.items()):
                    if (getattr(hook, "__module__", None) or "").startswith(FSDP):
                        undo(table.__setitem__, key, hook)
                        table[key] = function


def _check(name: str, p: Any) -> None:
    """Raise RuntimeError unless the parameter is divided along one dimension of its mesh."""
    *outer, last = p.placements
    if not (last.is_shard() and all(each.is_replicate() for each in outer)):
        raise not_supported(name, p)
    if p.device.type != p.device_mesh.device_type:
        raise UnsupportedError(
            f"parameter {name!r} is on {p.device} for a mesh of {p.device_mesh.device_type} "
            f"devices: CPUOffloadPolicy is not supported; call fully_shard without it"
        )
    if hasattr(p.to_local(), "fsdp_pre_all_gather"):
        raise UnsupportedError(
            f"parameter {name!r} is a {type(p.to_local()).__name__}, which changes what FSDP "
            f"gathers; call fully_shard on parameters that are plain tensors"
        )


def _casts(policy: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the hooks before and after ``forward`` do to inputs and outputs."""

    def before(module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
        if policy.param_dtype is None or not policy.cast_forward_inputs:
            return args, named
        return _cast(args, policy.param_dtype), _cast(named, policy.param_dtype)

    def after(module: nn.Module, args: Any, outputs: Any) -> Any:
        return outputs if policy.output_dtype is None else _cast(outputs, policy.output_dtype)

    return before, after


def _cast(items: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, items)


def _put_back(table: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        table.pop(name, None)
    else:
        table[name] = value


class Rounds:
    """Full parameters for ranks that need different ones, or different numbers of them.

    Graphs differ between ranks: a rank may have fewer batches, or none. So nothing is gathered
    before all ranks know of it. In each round every rank names the parameter that it needs, or that
    it needs no more, and all ranks gather what was named. A rank that is done takes part until all
    are. This is the only place where collectives are called under the lock of the process, so these
    ranks must be processes, not threads.

    Args:
        shards: what is gathered.
        ranks: the ranks of its mesh.
    """

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        self._shards, self._ranks = shards, ranks
        self._number = {name: number for number, name in enumerate(shards.parameters)}
        self._names = list(shards.parameters)

    def gather(self, name: str) -> Tensor:
        """The full parameter of this name."""
        return self._round(self._number[name])[name]

    def finish(self) -> None:
        """Take part in what the other ranks need, until all are done."""
        while self._round(-1):
            pass

    def _round(self, wanted: int) -> Mapping[str, Tensor]:
        """One round; returns the parameter that this rank wants, and None for the others."""
        numbers = self._ranks.rows(torch.tensor([wanted], device="cpu"))[:, 0].tolist()
        found: dict[str, Any] = {}
        for number in sorted(set(numbers) - {-1}):
            full = self._shards.full(self._names[number])
            found[self._names[number]] = full if number == wanted else None
        return found
